#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

#include <simt/report.h>
#include <simt/sanitizer.h>
#include <simt/shared_memory.h>

namespace simt {

namespace {

// As float, half or bfloat16 these bytes are a NaN; as an index or pointer they are far outside.
constexpr int poison_byte = 0xFF;
// As half 6.1e4, as bfloat16 or float 1.3e36; as an index or pointer far outside too.
constexpr int finite_byte = 0x7B;
constexpr int redzone_byte = 0xA5;
constexpr int64_t redzone_bytes = 1024;

// One redzone before the memory, one after; both keep its alignment of 1024.
constexpr int64_t mapping_bytes = redzone_bytes + SharedMemory::limit_bytes + redzone_bytes;

}  // namespace

SharedMemory::~SharedMemory() {
    if (!data_) return;
    sanitizer::unpoison(data_ - redzone_bytes, mapping_bytes);
    munmap(data_ - redzone_bytes, mapping_bytes);
}

void SharedMemory::allocate() {
    void* mapping = mmap(nullptr, mapping_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap of shared memory");
    data_ = static_cast<std::byte*>(mapping) + redzone_bytes;
}

void SharedMemory::begin_block(int64_t bytes, Garbage garbage) {
    if (!data_) allocate();
    bytes_ = bytes;
    sanitizer::unpoison(data_ - redzone_bytes, mapping_bytes);
    std::memset(data_, garbage == Garbage::nan ? poison_byte : finite_byte, bytes);
    std::memset(data_ + bytes, redzone_byte, redzone_bytes);
    sanitizer::poison(data_ - redzone_bytes, redzone_bytes);
    sanitizer::poison(data_ + bytes, mapping_bytes - redzone_bytes - bytes);
}

void SharedMemory::check_redzone() const {
    if (sanitizer::enabled) return;
    const std::byte* end = data_ + bytes_;
    const std::byte* hit = std::find_if(end, end + redzone_bytes, [](std::byte b) { return b != std::byte{redzone_byte}; });
    if (hit != end + redzone_bytes)
        fail("a thread wrote " + std::to_string(hit - end) + " bytes behind the end of the block's " +
             std::to_string(bytes_) + " bytes of shared memory");
}

uint32_t SharedMemory::address_of(const void* pointer, const Site& site) const {
    int64_t offset = static_cast<const std::byte*>(pointer) - data_;
    if (offset < 0 || offset > bytes_) fail(to_string(site) + " of a pointer that does not point to shared memory");
    return first_address + static_cast<uint32_t>(offset);
}

std::byte* SharedMemory::at(uint32_t address, int bytes, const Site& site) const {
    int64_t offset = int64_t{address} - first_address;
    // PTX ISA, "Addresses as Operands": an address must be a multiple of the access's size.
    if (address % static_cast<uint32_t>(bytes) != 0)
        fail(to_string(site) + " at byte " + std::to_string(offset) + " of shared memory, which is not a multiple of " +
             std::to_string(bytes));
    if (offset < 0 || offset + bytes > bytes_)
        fail(to_string(site) + " of " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset) +
             " of shared memory, of which the block has " + std::to_string(bytes_));
    return data_ + offset;
}

void SharedMemory::poison(std::byte* first, int64_t bytes) { std::memset(first, poison_byte, bytes); }

bool SharedMemory::is_poison(const std::byte* first, int64_t bytes) {
    // all are poison if the first is, and each equals the one before
    return bytes == 0 || (*first == std::byte{poison_byte} && std::memcmp(first, first + 1, bytes - 1) == 0);
}

}  // namespace simt
