// What the estimates of all kernels share: bytes, time, and the constants of the hardware.
#pragma once

#include "plan/device.h"
#include "plan/plan.h"
#include "problem.h"

namespace fused_cna {

// Assumptions that no measurement has yet replaced; times in multiprocessor cycles unless the name says otherwise.
inline constexpr double launch_us = 2.5;
inline constexpr double launch_behind_us = 1.5;  // of a kernel that waits for the one ahead; as measured on an H200
// Of that, what programmatic dependent launch hides: it overlaps the launch and the prologue with the kernel ahead.
// Assumed, public figures are 1 to 1.5.
inline constexpr double hidden_launch_us = 1.0;
inline constexpr double mma_share = 0.85;        // of the tensor cores' rate, in a main loop that is fed
inline constexpr double memory_latency = 800;    // from a copy's start to its landing
inline constexpr double step_latency = 240;      // barrier, loads from shared memory and products of a lone step
inline constexpr double block_start = 700;       // launch, first addresses, tables: until operands are waited for
inline constexpr double block_ends = 3000;       // where nothing is known apart: all but the main loop of a lone block
inline constexpr double issued_per_cycle = 2.2;  // warp instructions, of four: the most that was measured, on an H200
inline constexpr double shared_bytes_per_cycle = 128;
inline constexpr double copies_per_cycle = 8;  // cp.async of single threads
// To one multiprocessor while all read operands. Plain reads reach 42 on an H200 (9.4 TB/s), but with 42 the plans for
// ResNet-50 at batch 32 are 5 % slower, as measured, and with 36 no faster.
inline constexpr double l2_bytes_per_cycle = 26;
inline constexpr double lone_l2_bytes_per_cycle = 42;  // to one of few multiprocessors that read
inline constexpr double l2_latency = 300;

double as_us(double cycles, const DeviceInfo& device);

// Through device memory.
double transfer_us(double bytes, const DeviceInfo& device);

// Between the multiprocessors and the L2, all of them taking part.
double l2_us(double bytes, const DeviceInfo& device);

// From the L2 to one multiprocessor, while so many blocks read: fewer blocks than multiprocessors share the L2's rate.
double l2_bytes_per_cycle_of(int64_t blocks, const DeviceInfo& device);

// What a kernel's launch costs behind the one whose results it waits for.
double second_launch_us(const DeviceInfo& device);

double x_bytes(const ConvProblem& problem);
double weight_bytes(const ConvProblem& problem);
double y_bytes(const ConvProblem& problem);

// What any kernel moves: each operand and the residual once. Pixels that a strided 1x1 filter skips are not read.
double compulsory_bytes(const ConvProblem& problem);

// The epilogue of a block that makes so many outputs: what it takes of a multiprocessor, and how long it lasts alone.
struct EpilogueCycles {
    double busy, alone;
};
EpilogueCycles epilogue_cycles(const ConvProblem& problem, double outputs, int threads);

// The separate passes that a plan asks for.
double conversions_us(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device);

// How many blocks run on one multiprocessor at a time; 0 where not even one fits. `by_registers` is the kernel's launch
// bound.
int64_t resident_blocks(int threads, int64_t shared_bytes, int by_registers, const DeviceInfo& device);

// How many times a multiprocessor that holds `resident` blocks at once starts anew.
double waves(const Plan& plan, int64_t resident, const DeviceInfo& device);

}  // namespace fused_cna
