// The C function that runs a test kernel by name, for binding.py.
#include <map>
#include <stdexcept>
#include <string>

#include <simt/block.h>

#include "../kernels/test_kernel.h"
#include "guarded.h"

namespace simt_tests {

namespace {

std::map<std::string, Run>& registry() {
    static std::map<std::string, Run> kernels;
    return kernels;
}

}  // namespace

TestKernel::TestKernel(const char* name, Run run) { registry()[name] = run; }

Run find_test_kernel(const char* name) {
    auto found = registry().find(name);
    if (found == registry().end()) throw std::out_of_range(std::string("no test kernel is called ") + name);
    return found->second;
}

}  // namespace simt_tests

extern "C" int simt_run_test_kernel(const char* name, const float* input, int64_t inputs, float* output, int64_t outputs,
                                    uint64_t seed, char* error_text, int64_t error_size) {
    return simt::guarded({error_text, error_size}, [&] {
        simt::set_seed(seed);
        return simt_tests::find_test_kernel(name)({input, inputs, output, outputs});
    });
}
