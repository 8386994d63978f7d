#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <simt/block.h>

#include "../kernels/test_kernel.h"

// The sanitized test kernels, a program: NAME INPUTS OUTPUTS SEED. The input is 0, 1, 2, ...; prints the output, one number
// per line. Both are in heap blocks of exactly their size. A kernel at fault: exit status 3, the report on stderr.
int main(int argc, char** argv) {
    if (argc != 5) {
        std::fprintf(stderr, "usage: %s NAME INPUTS OUTPUTS SEED\n", argv[0]);
        return 2;
    }
    std::vector<float> input(std::stoul(argv[2])), output(std::stoul(argv[3]), -1.0f);
    for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i);
    simt::set_seed(std::stoull(argv[4]));
    try {
        simt_tests::Buffers buffers{input.data(), static_cast<int64_t>(input.size()), output.data(),
                                    static_cast<int64_t>(output.size())};
        if (const char* refused = simt_tests::find_test_kernel(argv[1])(buffers)) {
            std::fprintf(stderr, "%s\n", refused);
            return 3;
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 3;
    }
    for (float value : output) std::printf("%.9g\n", value);
    return 0;
}
