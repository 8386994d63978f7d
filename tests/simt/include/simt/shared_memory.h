#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

// A block's dynamic shared memory: exactly as large as the launch asked for, 1024-byte aligned, poisoned per block.
class SharedMemory {
   public:
    // The most that a block may have, as on compute capability 9.0 (CUDA C++ Programming Guide, "Compute Capabilities").
    static constexpr int64_t limit_bytes = 227 * 1024;

    SharedMemory() = default;
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    // Fills `bytes` of memory with the poison; whatever lies outside is a redzone.
    void begin_block(int64_t bytes);

    // Reports a write behind the end, which builds without AddressSanitizer notice only here.
    void check_redzone() const;

    std::byte* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

   private:
    void allocate();

    std::byte* data_ = nullptr;
    int64_t bytes_ = 0;
};

}  // namespace simt
