#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <simt/sanitizer.h>

#include "conv_call.h"

// The sanitized operator, a program: CASE RESULT. The case is a ConvCall whose non-null addresses stand for data that
// follows: for each of them, in order, a Region and its bytes. The result is the output's bytes.

namespace {

struct Region {
    int64_t bytes;         // from the first element to the last
    int64_t misalignment;  // the caller's first byte, modulo 16
};

// A copy in a heap block that ends with the copy's last byte.
class Memory {
   public:
    Memory(std::istream& file) {
        file.read(reinterpret_cast<char*>(&region_), sizeof region_);
        block_ = std::make_unique<char[]>(region_.misalignment + region_.bytes);
        file.read(data(), region_.bytes);
        if (!file) throw std::runtime_error("the case ends too early");
        simt::sanitizer::poison(block_.get(), region_.misalignment);
    }
    ~Memory() {
        if (block_) simt::sanitizer::unpoison(block_.get(), region_.misalignment);
    }
    Memory(Memory&&) = default;

    char* data() const { return block_.get() + region_.misalignment; }
    int64_t bytes() const { return region_.bytes; }

   private:
    Region region_{};
    std::unique_ptr<char[]> block_;
};

void run(const char* case_path, const char* result_path) {
    std::ifstream file(case_path, std::ios::binary);
    simt::ConvCall call;
    file.read(reinterpret_cast<char*>(&call), sizeof call);
    if (!file) throw std::runtime_error(std::string(case_path) + " is not a case");
    std::vector<void**> pointers{&call.x.data, &call.weight.data, &call.dense_x.data, &call.dense_weight.data,
                                 &call.residual.data};
    for (void*& vector : call.vectors) pointers.push_back(&vector);
    pointers.push_back(&call.y.data);
    std::vector<Memory> memory;
    for (void** pointer : pointers) {
        if (!*pointer) continue;
        memory.emplace_back(file);
        *pointer = memory.back().data();
    }
    simt::run_conv(call);
    std::ofstream(result_path, std::ios::binary).write(memory.back().data(), memory.back().bytes());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: %s CASE RESULT\n", argv[0]);
        return 2;
    }
    try {
        run(argv[1], argv[2]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 3;
    }
    return 0;
}
