#pragma once
#include <cstddef>
#include <cstdint>

#include <simt/report.h>

namespace simt {

// A block's dynamic shared memory: exactly as large as the launch asked for, 1024-byte aligned, poisoned per block.
class SharedMemory {
   public:
    // The most that a block may have, as on compute capability 9.0 (CUDA C++ Programming Guide, "Compute Capabilities").
    static constexpr int64_t limit_bytes = 227 * 1024;

    // Where it lies in the shared state space. Not at 0, as on a GPU the system's own shared memory is there.
    static constexpr uint32_t first_address = 1024;

    SharedMemory() = default;
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    // Fills `bytes` of memory with the poison; whatever lies outside is a redzone.
    void begin_block(int64_t bytes);

    // Reports a write behind the end, which builds without AddressSanitizer notice only here.
    void check_redzone() const;

    // PTX ISA, "Data Movement and Conversion Instructions: cvta": the 32-bit address of what a generic pointer points to.
    // Reported: a pointer to anything but this memory.
    uint32_t address_of(const void* pointer, const Site& site) const;

    // What lies at such an address. Reported: an access of `bytes` that is not wholly inside, or not aligned to them.
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
