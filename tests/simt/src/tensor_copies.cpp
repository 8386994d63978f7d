#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include <simt/cluster.h>
#include <simt/sanitizer.h>
#include <simt/tensor_copies.h>

namespace simt {

namespace {

using fused_cna::device::MapGeometry;
using fused_cna::device::TensorMap;
using Box = TensorCopies::Box;

// The unit of the swizzle, which the hardware copies at once.
constexpr int chunk_bytes = 16;

// The most pieces that a load lands in.
constexpr int most_pieces = 4;

constexpr int dimensions = MapGeometry::most_dimensions;
using Coordinates = std::array<int64_t, dimensions>;

const MapGeometry& open(const TensorMap& map, bool is_im2col, int rank, const Site& site) {
    block().cluster().prerequisites.check_ended(site);
    if (map.state != TensorMap::encoded) fail(to_string(site) + " by a tensor map that was never encoded");
    if (map.geometry.is_im2col != is_im2col)
        fail(to_string(site) + " by a map that was encoded as " + (is_im2col ? "tiled" : "im2col"));
    if (map.geometry.rank != rank)
        fail(to_string(site) + " with " + std::to_string(rank) + " coordinates by a map of " +
             std::to_string(map.geometry.rank) + " dimensions");
    return map.geometry;
}

// Places a box whose rows are known. CUDA C++ Programming Guide, "Asynchronous Data Copies using the Tensor Memory
// Accelerator": an address in shared memory must be a multiple of 128. "Swizzling Modes": the pattern repeats from multiples
// of 1024 and 512 bytes on. Elsewhere it would begin in its middle, by the "base offset", on which these kernels should not
// rely.
void place(Box& box, uint32_t address, const MapGeometry& map, const SharedMemory& shared, const Site& site) {
    const std::string where =
        to_string(site) + " at byte " + std::to_string(int64_t{address} - SharedMemory::first_address) + " of shared memory";
    const uint32_t pattern = map.swizzle_bytes == 128 ? 1024 : 512;
    if (address % pattern != 0)
        fail(where + ", which is not a multiple of " + std::to_string(pattern) + " as the swizzle of " +
             std::to_string(map.swizzle_bytes) + " bytes wants it");
    if (address < SharedMemory::first_address || address - SharedMemory::first_address + box.bytes() > shared.bytes())
        fail(where + ", of which the block has " + std::to_string(shared.bytes()) + ": the box has " +
             std::to_string(box.bytes()));
    box.address = address;
    box.shared = shared.data() + (address - SharedMemory::first_address);
}

// The dense dimension's part of every row: `elements` from the coordinate `first` on.
Box make_rows(int64_t first, int elements, const MapGeometry& map, const Site& site) {
    const int element = static_cast<int>(size_in_bytes(map.dtype));
    Box box;
    box.row_bytes = elements * element;
    if (box.row_bytes != map.swizzle_bytes)
        fail(to_string(site) + " of rows of " + std::to_string(box.row_bytes) + " bytes, which do not fill the " +
             std::to_string(map.swizzle_bytes) + " of the swizzle");
    box.first_byte = static_cast<int>(std::clamp<int64_t>(-first, 0, elements)) * element;
    box.end_byte = static_cast<int>(std::clamp<int64_t>(map.sizes[0] - first, 0, elements)) * element;
    return box;
}

// Null outside the tensor.
std::byte* find_row(const MapGeometry& map, const Coordinates& at) {
    int64_t offset = at[0] * size_in_bytes(map.dtype);
    for (int i = 1; i < map.rank; ++i) {
        if (at[i] < 0 || at[i] >= map.sizes[i]) return nullptr;
        offset += at[i] * map.strides[i];
    }
    return static_cast<std::byte*>(const_cast<void*>(map.address)) + offset;
}

// "Tiled mode": "the source multi-dimensional tensor layout is preserved at the destination".
Box make_tile(const MapGeometry& map, std::initializer_list<int> at, const Site& site) {
    Coordinates first{};
    std::copy(at.begin(), at.end(), first.begin());
    std::array<int, dimensions> count{1, 1, 1, 1};
    std::copy_n(map.box.begin(), map.rank, count.begin());
    Box box = make_rows(first[0], count[0], map, site);
    box.rows.reserve(count[1] * count[2] * count[3]);
    for (int t = 0; t < count[3]; ++t) {
        for (int z = 0; z < count[2]; ++z) {
            for (int y = 0; y < count[1]; ++y)
                box.rows.push_back(find_row(map, {first[0], first[1] + y, first[2] + z, first[3] + t}));
        }
    }
    return box;
}

// The range of pixels along w or h that a box is taken from.
struct Side {
    int64_t first, last;  // "Bounding-Box Lower-Corner", "Upper-Corner"
    int step;             // "Traversal Stride"
};

void check_inside(const char* name, int at, const Side& side, const Site& site) {
    // "Across DHW dimensions: specify the location of the convolution filter base in the tensor space. The filter corner
    // location must be within the bounding box."
    if (at >= side.first && at <= side.last) return;
    fail(to_string(site) + " from " + name + " " + std::to_string(at) +
         " on, outside of the bounding box, which goes from " + std::to_string(side.first) + " to " +
         std::to_string(side.last));
}

void check_offset(const char* name, int offset, const Site& site) {
    // "im2col offsets range", of 4D: [0, 2^8 - 1].
    if (offset >= 0 && offset <= 255) return;
    fail(to_string(site) + " with " + name + " " + std::to_string(offset) + ": it must be from 0 to 255");
}

// "Im2col mode". Pixels follow each other along w, then h, then n; after the end of the bounding box the next is at its
// lower corner. "The im2col offsets are added to the filter base coordinates to determine the starting location in the
// tensor space from where the elements are accessed": that location may be outside the tensor, as may a pixel after the last
// image.
Box make_column(const MapGeometry& map, const Coordinates& at, int offset_w, int offset_h, const Side& w, const Side& h,
                const Site& site) {
    Box box = make_rows(at[0], map.channels, map, site);
    box.rows.reserve(map.pixels);
    Coordinates base = at;
    for (int i = 0; i < map.pixels; ++i) {
        box.rows.push_back(find_row(map, {base[0], base[1] + offset_w, base[2] + offset_h, base[3]}));
        base[1] += w.step;
        if (base[1] <= w.last) continue;
        base[1] = w.first;
        base[2] += h.step;
        if (base[2] <= h.last) continue;
        base[2] = h.first;
        ++base[3];
    }
    return box;
}

// "Swizzling Modes": within each line of 128 bytes, the index of a 16-byte chunk is xor-ed with the line's index, counted
// from a multiple of 1024 or 512 bytes. A chunk stays in its row, which is as long as the swizzle's span. Returns the bits
// to flip in a byte's index in the row; flipping twice restores it.
int swizzle(const Box& box, int row) {
    const uint32_t address = box.address + static_cast<uint32_t>(row * box.row_bytes);
    const uint32_t lines = box.row_bytes == 128 ? 8 : 4;
    return static_cast<int>(address / 128 % lines * chunk_bytes);
}

// Calls copy(byte of the row, count) for the 16-byte chunks of a row, or for the parts of them that are inside the tensor.
// The size of a whole chunk is a constant, so that its copy compiles to an instruction, not a call.
template <class Copy>
void copy_row(const Box& box, const Copy& copy) {
    constexpr std::integral_constant<int, chunk_bytes> whole;
    if (box.is_whole()) {
        for (int byte = 0; byte < box.row_bytes; byte += chunk_bytes) copy(byte, whole);
        return;
    }
    for (int byte = box.first_byte; byte < box.end_byte;) {
        const int end = std::min(box.end_byte, byte / chunk_bytes * chunk_bytes + chunk_bytes);
        copy(byte, end - byte);
        byte = end;
    }
}

// Makes AddressSanitizer report where the load was started.
void read_for_sanitizer(const Box& box) {
    if (!sanitizer::enabled) return;
    for (const std::byte* row : box.rows) {
        for (int i = box.first_byte; row && i < box.end_byte; ++i) (void)*static_cast<const volatile std::byte*>(row + i);
    }
}

void check_untouched(bool untouched, const Box& box, int thread, const char* direction, const SharedMemory& shared,
                     const Site& site) {
    if (untouched) return;
    fail("bytes " + std::to_string(box.shared - shared.data()) + " to " +
         std::to_string(box.shared - shared.data() + box.bytes() - 1) +
         " of shared memory: some were written while thread " + std::to_string(thread) + "'s " + to_string(site) +
         direction + " them was under way");
}

// A load in flight; its pieces share it.
struct Load {
    Block& block;  // that started it; another may be running when it lands
    int thread;
    Box box;
    uint32_t barrier;
    Site site;
    int pieces = 0;  // that have not landed yet

    void land(int first_row, int end_row);
};

void Load::land(int first_row, int end_row) {
    std::byte* destination = box.shared + int64_t{first_row} * box.row_bytes;
    const int64_t bytes = int64_t{end_row - first_row} * box.row_bytes;
    check_untouched(SharedMemory::is_poison(destination, bytes), box, thread, " to", block.shared, site);
    thread_local std::vector<std::byte> piece;
    piece.resize(bytes);
    for (int row = first_row; row < end_row; ++row) {
        const std::byte* source = box.rows[row];
        std::byte* target = piece.data() + int64_t{row - first_row} * box.row_bytes;
        // "Out of Boundary Access": zeros outside the tensor.
        if (!source || !box.is_whole()) std::memset(target, 0, box.row_bytes);
        if (!source) continue;
        copy_row(box, [&, flip = swizzle(box, row)](int byte, auto count) {
            std::memcpy(target + (byte ^ flip), source + byte, count);
        });
    }
    block.proxy.write(destination, piece.data(), bytes);
    // ".mbarrier::complete_tx::bytes": upon completion, with the amount of data copied in bytes; zeros count too.
    if (--pieces == 0) block.phases.complete_bytes(barrier, static_cast<int>(box.bytes()), site);
}

void start_load(int thread, Box box, uint32_t barrier, const Site& site) {
    Block& running = block();
    read_for_sanitizer(box);
    running.proxy.poison(box.shared, box.bytes());
    const int rows = static_cast<int>(box.rows.size());
    const auto load = std::make_shared<Load>(running, thread, std::move(box), barrier, site);
    load->pieces = std::min(rows, most_pieces);
    for (int i = 0; i < load->pieces; ++i) {
        const int first = rows * i / load->pieces, end = rows * (i + 1) / load->pieces;
        running.scheduler.later([load, first, end] { load->land(first, end); });
    }
}

void land_store(const Box& box, const std::vector<std::byte>& source, int thread, const Block& running, const Site& site) {
    const bool is_untouched = std::memcmp(box.shared, source.data(), source.size()) == 0;
    check_untouched(is_untouched, box, thread, " from", running.shared, site);
    const std::byte* seen = running.proxy.view(box.shared);
    for (size_t row = 0; row < box.rows.size(); ++row) {
        if (!box.rows[row]) continue;
        const std::byte* shared_row = seen + static_cast<int64_t>(row) * box.row_bytes;
        copy_row(box, [&, flip = swizzle(box, static_cast<int>(row))](int byte, auto count) {
            std::memcpy(box.rows[row] + byte, shared_row + (byte ^ flip), count);
        });
    }
}

}  // namespace

void TensorCopies::load_tile(int thread, uint32_t destination, const TensorMap& map, uint32_t barrier,
                             std::initializer_list<int> at, const Site& site) {
    const MapGeometry& geometry = open(map, false, static_cast<int>(at.size()), site);
    Box box = make_tile(geometry, at, site);
    place(box, destination, geometry, block().shared, site);
    start_load(thread, std::move(box), barrier, site);
}

void TensorCopies::load_im2col(int thread, uint32_t destination, const TensorMap& map, uint32_t barrier, int c, int w, int h,
                               int n, int offset_w, int offset_h, const Site& site) {
    const MapGeometry& geometry = open(map, true, 4, site);
    const Side along_w{geometry.lower_w, geometry.sizes[1] - 1 + geometry.upper_w, geometry.step_w};
    const Side along_h{geometry.lower_h, geometry.sizes[2] - 1 + geometry.upper_h, geometry.step_h};
    check_inside("w", w, along_w, site);
    check_inside("h", h, along_h, site);
    check_offset("offset_w", offset_w, site);
    check_offset("offset_h", offset_h, site);
    Box box = make_column(geometry, {c, w, h, n}, offset_w, offset_h, along_w, along_h, site);
    place(box, destination, geometry, block().shared, site);
    start_load(thread, std::move(box), barrier, site);
}

void TensorCopies::store_tile(int thread, const TensorMap& map, uint32_t source, std::initializer_list<int> at,
                              const Site& site) {
    const MapGeometry& geometry = open(map, false, static_cast<int>(at.size()), site);
    // "Restriction on Tensor Copy instructions", for .global.shared::cta: "Starting co-ordinates for Bounding Box
    // (tensorCoords) must be non-negative."
    for (int coordinate : at) {
        if (coordinate < 0) fail(to_string(site) + " from coordinate " + std::to_string(coordinate) + " on: it is negative");
    }
    Box box = make_tile(geometry, at, site);
    place(box, source, geometry, block().shared, site);
    std::vector<std::byte> as_it_was(box.shared, box.shared + box.bytes());
    queues_[thread].uncommitted.push_back({std::move(box), std::move(as_it_was), site});
}

void TensorCopies::commit_stores(int thread) {
    Queue& queue = queues_[thread];
    queue.groups.push_back(std::move(queue.uncommitted));
    queue.uncommitted.clear();
}

void TensorCopies::wait_stores_read(int thread, int pending) {
    Queue& queue = queues_[thread];
    while (static_cast<int>(queue.groups.size()) > pending) {
        for (const Store& store : queue.groups.front()) land_store(store.box, store.source, thread, block(), store.site);
        queue.groups.pop_front();
    }
}

void TensorCopies::reset(int threads) {
    queues_.resize(threads);
    for (Queue& queue : queues_) {
        queue.groups.clear();
        queue.uncommitted.clear();
    }
}

void TensorCopies::check_end() const {
    for (size_t i = 0; i < queues_.size(); ++i) {
        const int thread = static_cast<int>(i);
        for (const std::vector<Store>& group : queues_[i].groups) {
            for (const Store& store : group) land_store(store.box, store.source, thread, block(), store.site);
        }
        if (!queues_[i].uncommitted.empty())
            fail("thread " + std::to_string(thread) + "'s " + to_string(queues_[i].uncommitted.front().site) +
                 " was never committed");
    }
}

}  // namespace simt
