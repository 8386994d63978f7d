// Replaces csrc/device/ptx.cuh when the kernels are compiled for the simulator. Kernels never pass the last argument of
// barriers and collectives: by default it is the kernel's position, for reports.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <source_location>
#include <type_traits>

#include <simt/cluster.h>
#include <simt/load_matrices.h>
#include <simt/multiply_add.h>
#include <simt/tf32.h>
#include <device/types.cuh>

namespace fused_cna::device {

using Where = std::source_location;

inline constexpr bool is_hopper = true;

inline int thread_x() { return simt::block().thread(); }
inline int64_t block_x() { return simt::block().index(); }
inline int64_t grid_x() { return simt::block().grid(); }
inline int lane() { return thread_x() % simt::warp_lanes; }
inline int warp() { return thread_x() / simt::warp_lanes; }

inline void await_prerequisites(Where where = Where::current()) {
    simt::block().cluster().prerequisites.wait({"await_prerequisites", where});
}

// PTX ISA, "griddepcontrol", .launch_dependents: a hint, by any thread and any number of times. Whenever the next kernel
// starts, its await_prerequisites waits for the end of this one, so there is nothing to simulate.
inline void launch_dependents() {}

inline void sync_threads(Where where = Where::current()) {
    simt::block().barriers.block().wait_for_block({"sync_threads", where});
}

// PTX ISA, "shfl.sync": every lane names a source lane by the low five bits of its operand. The source is within the warp,
// except that with .down a lane keeps its own value where the source would be after the last lane.
template <class T, class SourceLane>
T shuffle_from(const char* operation, T value, SourceLane source_lane, Where where) {
    static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8),
                  "a shuffle moves values of 2, 4 or 8 bytes");
    struct Slot {
        T value;
        T result;
        int source_lane;
    };
    Slot mine{value, value, source_lane(lane())};
    simt::collective(simt::block().warp(), {operation, where}, mine, [](simt::Lanes<Slot> lanes) {
        for (int i = 0; i < lanes.count(); ++i) lanes[i].result = lanes[lanes[i].source_lane].value;
    });
    return mine.result;
}

template <class T>
T shuffle_xor(T value, int mask, Where where = Where::current()) {
    return shuffle_from("shuffle_xor", value, [=](int lane) { return lane ^ (mask & 31); }, where);
}

template <class T>
T shuffle_down(T value, int delta, Where where = Where::current()) {
    auto source = [=](int lane) { return lane + (delta & 31) < simt::warp_lanes ? lane + (delta & 31) : lane; };
    return shuffle_from("shuffle_down", value, source, where);
}

template <class T>
T shuffle(T value, int source_lane, Where where = Where::current()) {
    return shuffle_from("shuffle", value, [=](int) { return source_lane & 31; }, where);
}

// PTX ISA, "vote.sync.ballot": bit i is lane i's predicate.
inline uint32_t ballot(bool predicate, Where where = Where::current()) {
    struct Slot {
        bool predicate;
        uint32_t result;
    };
    Slot mine{predicate, 0};
    simt::collective(simt::block().warp(), {"ballot", where}, mine, [](simt::Lanes<Slot> lanes) {
        uint32_t votes = 0;
        for (int i = 0; i < lanes.count(); ++i) votes |= uint32_t{lanes[i].predicate} << i;
        for (int i = 0; i < lanes.count(); ++i) lanes[i].result = votes;
    });
    return mine.result;
}

// PTX ISA, "Floating Point Instructions: max, min": .NaN gives the canonical NaN, and +0 is greater than -0.
inline float clamp(float x, float low, float high) {
    if (std::isnan(x)) return std::bit_cast<float>(0x7FFFFFFFu);
    const float raised = x > low || (x == low && !std::signbit(x)) ? x : low;
    return raised < high || (raised == high && std::signbit(raised)) ? raised : high;
}

// .ftz: a number below the normal ones counts as 0.
inline float flushed(float x) { return std::abs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

// CUDA C++ Programming Guide, "Mathematical Functions": exp2f, which is ex2.approx, is at most 2 ulp off; PTX ISA,
// "rcp.approx.ftz": at most 1. Here they always are, in the directions whose effects add up in 1 / (1 + e^x).
inline float exponential(float x) {
    const float result = std::exp2(flushed(x * 1.44269504f));
    return flushed(std::nextafter(std::nextafter(result, 2 * result), 2 * result));
}
inline float reciprocal(float x) {
    const float result = flushed(1.0f / flushed(x));
    return std::isinf(result) ? result : std::nextafter(result, 0.0f);
}

inline uint32_t shared_address(const void* pointer, Where where = Where::current()) {
    return simt::block().shared.address_of(pointer, {"shared_address", where});
}

// PTX ISA, "prefetch": changes nothing, and may come before the data is written. The address must be readable, which
// AddressSanitizer checks.
inline void prefetch(const void* address) {
    if (!simt::block().cluster().prerequisites.hides(address)) (void)*static_cast<const volatile char*>(address);
}

template <int Bytes>
void copy_async(uint32_t destination, const void* source, bool valid, Where where = Where::current()) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    simt::block().copies.start(thread_x(), destination, source, Bytes, valid, {"copy_async", where});
}

inline void commit_copies() { simt::block().copies.commit(thread_x()); }

template <int Pending>
void wait_copies() {
    static_assert(Pending >= 0);
    simt::block().copies.wait(thread_x(), Pending);
}

inline void load_matrices(uint32_t row_address, uint32_t (&words)[4], Where where = Where::current()) {
    const simt::Site site{"load_matrices", where};
    simt::LoadMatricesSlot mine{row_address, words};
    simt::collective(simt::block().warp(), site, mine, [&](simt::Lanes<simt::LoadMatricesSlot> lanes) {
        simt::load_matrices(lanes, simt::block().shared, site);
    });
}

template <class T>
inline constexpr simt::Operand operand_of = simt::Operand::tf32;
template <>
inline constexpr simt::Operand operand_of<half> = simt::Operand::half;
template <>
inline constexpr simt::Operand operand_of<bfloat16> = simt::Operand::bfloat16;

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current()) {
    static_assert(std::is_same_v<T, half> || std::is_same_v<T, bfloat16> || std::is_same_v<T, float>);
    using Slot = simt::MultiplyAddSlot<operand_of<T>>;
    Slot mine{d, a, b};
    simt::collective(simt::block().warp(), {"multiply_add", where}, mine,
                     [](simt::Lanes<Slot> lanes) { simt::multiply_add(lanes); });
}

inline uint32_t round_to_tf32(uint32_t bits) { return simt::round_to_tf32(bits); }

}  // namespace fused_cna::device
