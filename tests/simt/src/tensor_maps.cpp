#include <simt/tensor_maps.h>
#include <atomic>
#include <cstdint>
#include <string>

namespace simt {

namespace {

using fused_cna::device::MapGeometry;

std::atomic<bool> is_absent = false, is_failing = false;

std::string number(int64_t value) { return std::to_string(value); }

// "sizes[1]"
std::string item(const char* array, int i) { return std::string(array) + "[" + number(i) + "]"; }

// Empty where first <= value <= last.
std::string check_range(const std::string& name, int64_t value, int64_t first, int64_t last) {
    if (value >= first && value <= last) return "";
    return name + " is " + number(value) + ": it must be from " + number(first) + " to " + number(last);
}

std::string check_multiple_of_16(const std::string& name, int64_t value) {
    if (value % 16 == 0) return "";
    return name + " is " + number(value) + ": it must be a multiple of 16";
}

// The first non-empty text.
template <class... Texts>
std::string first_of(const Texts&... texts) {
    std::string found;
    ((found.empty() ? found = texts : found), ...);
    return found;
}

// globalAddress, globalDim, globalStrides, for tiled and im2col. The manual also says that each stride "includes previous
// dimension stride", but only in code that computes strides from paddings, whose assertion compares bytes with elements; it
// is not required here.
std::string check_tensor(const MapGeometry& map) {
    constexpr int64_t most_elements = int64_t{1} << 32, stride_limit = int64_t{1} << 40;
    const auto address = reinterpret_cast<uintptr_t>(map.address);
    if (address == 0) return "the address of the tensor is null";
    if (address % 16 != 0) return "the address of the tensor is " + number(address % 16) + " behind a multiple of 16";
    std::string wrong;
    for (int i = 0; i < map.rank && wrong.empty(); ++i) {
        wrong = check_range(item("sizes", i), map.sizes[i], 1, most_elements);
        if (i == 0) continue;  // the first is dense
        const std::string name = item("strides", i);
        wrong = first_of(wrong, check_range(name, map.strides[i], 0, stride_limit - 1),
                         check_multiple_of_16(name, map.strides[i]));
    }
    return wrong;
}

// A row is the box's part of the dense dimension.
std::string check_row(const char* elements_name, int64_t elements, const MapGeometry& map) {
    const int64_t bytes = elements * size_in_bytes(map.dtype);
    const std::string name = std::string("the row of the box (") + elements_name + ") in bytes";
    if (map.swizzle_bytes != 64 && map.swizzle_bytes != 128)
        return "the swizzle is of " + number(map.swizzle_bytes) + " bytes: it must be of 64 or 128";
    if (bytes > map.swizzle_bytes)
        return name + " is " + number(bytes) + ": it must be at most the " + number(map.swizzle_bytes) + " of the swizzle";
    return check_multiple_of_16(name, bytes);
}

// cuTensorMapEncodeTiled. It also takes five dimensions, which MapGeometry does not have.
std::string check_tiled(const MapGeometry& map) {
    std::string wrong = check_range("the rank", map.rank, 1, MapGeometry::most_dimensions);
    if (wrong.empty()) wrong = check_tensor(map);
    for (int i = 0; i < map.rank && wrong.empty(); ++i) wrong = check_range(item("box", i), map.box[i], 1, 256);
    return wrong.empty() ? check_row("box[0]", map.box[0], map) : wrong;
}

// "pixelBoxLowerCorner", "pixelBoxUpperCorner", for 4 dimensions; "elementStrides".
std::string check_side(const std::string& side, int64_t size, int lower, int upper, int step) {
    const std::string wrong = first_of(check_range("the lower corner in " + side, lower, -128, 127),
                                       check_range("the upper corner in " + side, upper, -128, 127),
                                       check_range("the step in " + side, step, 1, 8));
    if (!wrong.empty() || lower < size + upper) return wrong;
    return "the bounding box is empty in " + side + ": it goes from " + number(lower) + " to " + number(size - 1 + upper);
}

// cuTensorMapEncodeIm2col. It also takes three and five dimensions, for whose corners MapGeometry has no names. The manual
// does not require a pixel and a channel, but says that "a multiple of 16 bytes" is copied.
std::string check_im2col(const MapGeometry& map) {
    std::string wrong = check_range("the rank of an im2col map", map.rank, 4, 4);
    if (wrong.empty()) wrong = check_tensor(map);
    if (!wrong.empty()) return wrong;
    return first_of(check_side("w", map.sizes[1], map.lower_w, map.upper_w, map.step_w),
                    check_side("h", map.sizes[2], map.lower_h, map.upper_h, map.step_h),
                    check_range("channels", map.channels, 1, 256), check_range("pixels", map.pixels, 1, 1024),
                    check_row("channels", map.channels, map));
}

}  // namespace

bool has_tensor_maps() { return !is_absent; }

void refuse_tensor_maps(bool refuse) { is_absent = refuse; }

void fail_encoding(bool fail) { is_failing = fail; }

const char* find_map_refusal(const MapGeometry& geometry) {
    if (is_absent) return "the driver has no tensor maps";
    if (is_failing) return "the driver refused to encode a tensor map";
    thread_local std::string wrong;
    wrong = geometry.is_im2col ? check_im2col(geometry) : check_tiled(geometry);
    if (wrong.empty()) return nullptr;
    wrong = "the driver refused to encode a tensor map: " + wrong;
    return wrong.c_str();
}

}  // namespace simt
