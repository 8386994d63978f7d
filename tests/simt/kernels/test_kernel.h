// A registry of the simulator's own test kernels, by name.
#pragma once
#include <cstdint>

namespace simt_tests {

struct Buffers {
    const float* input;
    int64_t inputs;
    float* output;
    int64_t outputs;
};

// Launches one kernel over the buffers; returns the launch's result.
using Run = const char* (*)(const Buffers& buffers);

// Makes a kernel callable from Python by name. Define it as a static object.
struct TestKernel {
    TestKernel(const char* name, Run run);
};

// Throws std::out_of_range for an unknown name.
Run find_test_kernel(const char* name);

}  // namespace simt_tests
