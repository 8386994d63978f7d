// A block's dynamic shared memory.
#pragma once
#include <cstddef>
#include <cstdint>

#include <simt/report.h>

namespace simt {

// What is in a block's memory before anything is written there. On a GPU that is what an earlier block left.
enum class Garbage {
    nan,    // shows wherever it gets into a result
    finite  // large, for kernels that compute again what is not finite, and so hide a NaN
};

// Exactly as large as the launch requested, 1024-byte aligned, full of garbage for each block.
class SharedMemory {
   public:
    // The most that a block may have, as on compute capability 9.0 (CUDA C++ Programming Guide, "Compute Capabilities").
    static constexpr int64_t limit_bytes = 227 * 1024;

    // The first address in the shared state space. Not 0: on a GPU the system's own shared memory is there.
    static constexpr uint32_t first_address = 1024;

    SharedMemory() = default;
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    // Fills `bytes` of memory; everything outside is a redzone.
    void begin_block(int64_t bytes, Garbage garbage);

    // Reports a write after the end, which builds without AddressSanitizer notice only here.
    void check_redzone() const;

    // PTX ISA, "Data Movement and Conversion Instructions: cvta": the 32-bit address of a generic pointer. Reported: a
    // pointer to any other memory.
    uint32_t address_of(const void* pointer, const Site& site) const;

    // The memory at such an address. Reported: an access of `bytes` that is not entirely inside, or not aligned to its size.
    std::byte* at(uint32_t address, int bytes, const Site& site) const;

    static void poison(std::byte* first, int64_t bytes);
    static bool is_poison(const std::byte* first, int64_t bytes);

    std::byte* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

   private:
    void allocate();

    std::byte* data_ = nullptr;
    int64_t bytes_ = 0;
};

}  // namespace simt
