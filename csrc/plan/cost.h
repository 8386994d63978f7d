// What the estimates of all kernels share: bytes, time, and the constants of the hardware.
#pragma once

#include "plan/device.h"
#include "plan/plan.h"
#include "problem.h"

namespace fused_cna {

// Assumptions, not measured yet unless they say so; times in multiprocessor cycles unless the name says otherwise.
inline constexpr double launch_us = 2.5;
inline constexpr double launch_behind_us = 1.5;  // of a kernel that waits for the previous one; measured on an H200
// The part of it that programmatic dependent launch hides, by overlapping launch and prologue with the previous kernel.
// Assumed; public figures are 1 to 1.5.
inline constexpr double hidden_launch_us = 1.0;
inline constexpr double mma_share = 0.85;        // of the tensor cores' rate, in a main loop that never waits for operands
inline constexpr double memory_latency = 800;    // from a copy's start until it has landed
inline constexpr double step_latency = 240;      // barrier, loads from shared memory and products of a lone step
inline constexpr double block_start = 700;       // launch, first addresses, tables: until operands are waited for
inline constexpr double block_ends = 3000;       // all of a lone block but its main loop, where the parts are unknown
inline constexpr double issued_per_cycle = 2.2;  // warp instructions, of four: the most measured, on an H200
inline constexpr double shared_bytes_per_cycle = 128;
inline constexpr double copies_per_cycle = 8;  // cp.async instructions of one thread each
// To one multiprocessor while all read operands. Plain reads reach 42 on an H200 (9.4 TB/s), but the plans chosen with 42
// were measured 5 % slower for ResNet-50 at batch 32; those with 36 were no faster.
inline constexpr double l2_bytes_per_cycle = 26;
inline constexpr double lone_l2_bytes_per_cycle = 42;  // to one multiprocessor while few read
inline constexpr double l2_latency = 300;

double as_us(double cycles, const DeviceInfo& device);

// Through device memory.
double transfer_us(double bytes, const DeviceInfo& device);

// Between the multiprocessors and the L2, with all multiprocessors taking part.
double l2_us(double bytes, const DeviceInfo& device);

// From the L2 to one multiprocessor, while `blocks` blocks read: fewer blocks than multiprocessors share the L2's rate.
double l2_bytes_per_cycle_of(int64_t blocks, const DeviceInfo& device);

// The cost of launching a kernel right after the one whose results it waits for.
double second_launch_us(const DeviceInfo& device);

double x_bytes(const ConvProblem& problem);
double weight_bytes(const ConvProblem& problem);
double y_bytes(const ConvProblem& problem);

// The bytes that any kernel must move: each operand and the residual once, without pixels that a strided 1x1 filter skips.
double compulsory_bytes(const ConvProblem& problem);

// The epilogue of a block with `outputs` outputs: the multiprocessor time that it uses, and its duration alone.
struct EpilogueCycles {
    double busy, alone;
};
EpilogueCycles epilogue_cycles(const ConvProblem& problem, double outputs, int threads);

// The separate passes that a plan needs.
double conversions_us(const ConvProblem& problem, const Plan& plan, const DeviceInfo& device);

// How many blocks run on one multiprocessor at a time; 0 where none fits. `by_registers` is the kernel's launch bound.
int64_t resident_blocks(int threads, int64_t shared_bytes, int by_registers, const DeviceInfo& device);

// How many times the device is filled, with `resident` blocks per multiprocessor at once.
double waves(const Plan& plan, int64_t resident, const DeviceInfo& device);

}  // namespace fused_cna
