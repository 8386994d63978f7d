// Each kernel's share of the plan, in a file of its own: which problems it takes, in which forms, and what they should cost.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../plan.h"

namespace fused_cna {

inline constexpr int64_t int_limit = std::numeric_limits<int32_t>::max();

// For example "it needs 300 bytes, at most 200 bytes".
std::string with_numbers(const char* text, int64_t given, const char* unit, int64_t limit);

// Why no kernel on tensor cores or with cp.async can run on the device; empty where they can.
std::string too_old(const DeviceInfo& device);

// Why a kernel whose blocks make rectangles of output pixels cannot count in 32 bits; empty where it can. A rectangle may
// reach beyond the output, by no more than the output's own size.
std::string too_far(const ConvProblem& problem);

// Each appends its kernel's candidates for the problem, those that cannot run it with the reason.
void add_direct(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all);
void add_depthwise_toeplitz(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all);
void add_grouped(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all);
void add_depthwise(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all);
void add_stem(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all);
void add_implicit_gemm(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all);
void add_small_m(const ConvProblem& problem, const DeviceInfo& device, std::vector<Candidate>& all);

// For example " after a copy of x"; empty where a plan copies nothing.
std::string describe_copies(const Plan& plan);

// Each says what tells its kernel's plans of one tile apart, for to_string.
std::string describe_depthwise(const Plan& plan);
std::string describe_implicit_gemm(const Plan& plan);
std::string describe_small_m(const Plan& plan);
std::string describe_depthwise_toeplitz(const Plan& plan);
std::string describe_grouped(const Plan& plan);
std::string describe_stem(const Plan& plan);

}  // namespace fused_cna
