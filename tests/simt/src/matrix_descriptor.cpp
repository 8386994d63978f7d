#include <cstring>
#include <string>

#include <simt/matrix_descriptor.h>

namespace simt {

namespace {

constexpr int row_bytes = 128, rows_per_group = 8, group_bytes = row_bytes * rows_per_group, chunk_bytes = 16;
constexpr int swizzle_128 = 1;

int field(uint64_t descriptor, int first_bit, int bits) {
    return static_cast<int>(descriptor >> first_bit & ((uint64_t{1} << bits) - 1));
}

}  // namespace

SharedMatrix::SharedMatrix(uint64_t descriptor, int rows, const char* name, const SharedMemory& shared, const Site& site)
    : rows_(rows) {
    const auto refuse = [&](const std::string& reason) {
        fail(to_string(site) + " with the descriptor of " + name + ", " + std::to_string(descriptor) + ": " + reason);
    };
    // Bits 16-29 are the leading dimension offset: "Swizzled layouts: not used".
    const int start = field(descriptor, 0, 14) << 4, stride = field(descriptor, 32, 14) << 4;
    if (field(descriptor, 14, 2) || field(descriptor, 30, 2) || field(descriptor, 46, 3) || field(descriptor, 52, 10))
        refuse("bits are set that have no meaning");
    if (field(descriptor, 62, 2) != swizzle_128)
        refuse("swizzling mode " + std::to_string(field(descriptor, 62, 2)) + ", of which only 1 (128 bytes) is simulated");
    // "The value of base offset is 0 when the repeating pattern starts" on a 1,024-byte boundary.
    if (field(descriptor, 49, 3) != 0) refuse("a base offset, which a pattern from a multiple of 1024 on has not");
    if (stride == 0 || stride % group_bytes != 0)
        refuse("a stride of " + std::to_string(stride) + " bytes from eight rows to the next, which is no multiple of 1024");
    const int along_row = start % group_bytes;
    if (along_row + bytes_per_row > row_bytes)
        refuse("it starts " + std::to_string(along_row) + " bytes behind a multiple of 1024, which is not in the first row");
    const int64_t first = int64_t{start} - along_row - SharedMemory::first_address;
    const int64_t end = first + int64_t{rows / rows_per_group - 1} * stride + group_bytes;
    if (first < 0 || end > shared.bytes())
        refuse("bytes " + std::to_string(first) + " to " + std::to_string(end) +
               " of shared memory, of which the block has " + std::to_string(shared.bytes()));
    start_ = shared.data() + first + along_row;
    stride_ = stride;
}

void SharedMatrix::read_row(int row, const AsyncProxy& proxy, std::byte* destination) const {
    const std::byte* group = start_ + row / rows_per_group * stride_;
    const int in_group = row % rows_per_group;
    for (int byte = 0; byte < bytes_per_row; byte += chunk_bytes) {
        // "Canonical Layouts", Swizzle<3, 4, 3>: bits 4 to 6 of an address are xor-ed with its bits 7 to 9. The memory is
        // aligned to 1,024 bytes.
        const auto plain = reinterpret_cast<uintptr_t>(group + in_group * row_bytes + byte);
        const auto swizzled = reinterpret_cast<const std::byte*>(plain ^ ((plain >> 7 & 7) << 4));
        std::memcpy(destination + byte, proxy.view(swizzled), chunk_bytes);
    }
}

}  // namespace simt
