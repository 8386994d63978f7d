// What a probe is made of: memory that both sides have, launches that end, and answers, each a line of JSON.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <device/device.cuh>
#include <device/launch.cuh>
#include <device/tensor_map.cuh>

namespace fused_cna::probe {

using namespace fused_cna::device;

template <class... A>
std::string text(const char* format, A... values) {
    char line[500];
    snprintf(line, sizeof(line), format, values...);
    return line;
}

inline void answer(const std::string& name, const std::string& word, const std::string& seen) {
    dprintf(1, "\"%s\": {\"answer\": \"%s\", \"seen\": \"%s\"},\n", name.c_str(), word.c_str(), seen.c_str());
}
inline void answer(const std::string& name, const std::string& wrong) {
    answer(name, wrong.empty() ? "right" : "wrong", wrong.empty() ? "all is as expected" : wrong);
}

inline void check(const char* error) {
    if (error) throw std::runtime_error(error);
}
inline void check(cudaError_t error) { check(error == cudaSuccess ? nullptr : cudaGetErrorString(error)); }

// Arrays lie in the host's memory, each at the same place of the GPU's, which gets it all before a kernel and gives it back.
constexpr int64_t arena_bytes = 16 << 20;
alignas(1024) inline char arena[arena_bytes];
inline char* arena_on_gpu = nullptr;
inline int64_t arena_used = 0;

// Of zeros.
template <class T>
T* make_array(int64_t count) {
    T* array = reinterpret_cast<T*>(arena + arena_used);
    arena_used += round_up(count * sizeof(T), 1024);
    check(arena_used <= arena_bytes ? nullptr : "the probe's memory is too small");
    return array;
}

template <class T>
T on_gpu(T value) {
    if (!arena_on_gpu) check(cudaMalloc(reinterpret_cast<void**>(&arena_on_gpu), arena_bytes));
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(arena_on_gpu + (reinterpret_cast<const char*>(value) - arena));
    } else {
        return value;
    }
}

template <auto kernel, class... A>
void run(const LaunchShape& shape, const A&... args) {
    check(cudaMemcpy(on_gpu(arena + 0), arena, arena_used, cudaMemcpyHostToDevice));
    check(launch<kernel>(shape, {}, on_gpu(args)...));
    cudaError_t state = cudaErrorNotReady;
    for (int ms = 0; ms < 5000 && (state = cudaStreamQuery(nullptr)) == cudaErrorNotReady; ++ms) usleep(1000);
    check(state == cudaErrorNotReady ? "hangs" : nullptr);
    check(state);
    check(cudaMemcpy(arena, arena_on_gpu, arena_used, cudaMemcpyDeviceToHost));
}

template <class From, class To>
__global__ void convert(const From* from, To* to, int count) {
    for (int i = thread_x(); i < count; i += 256) to[i] = from_float<To>(to_float(from[i]));
}
template <class To, class From>
To* converted(const From* from, int count) {
    To* to = make_array<To>(count);
    run<convert<From, To>>({1, 256, 0}, from, to, count);
    return to;
}

// From -4 to 4.
inline float integer(uint32_t i) { return static_cast<float>(static_cast<int>((i + 1) * 2654435761u >> 20) % 9 - 4); }
template <class T>
T* integers(int count, uint32_t first) {
    float* values = make_array<float>(count);
    for (int i = 0; i < count; ++i) values[i] = integer(first + i);
    return converted<T>(values, count);
}

template <class Expected>
std::string difference(const float* seen, int count, int columns, const Expected& expected) {
    for (int i = 0; i < count; ++i) {
        if (seen[i] != expected(i)) return text("[%d, %d] is %g, not %g", i / columns, i % columns, seen[i], expected(i));
    }
    return "";
}

template <class T>
constexpr DType dtype_of = sizeof(T) == 4            ? DType::float32
                           : std::is_same_v<T, half> ? DType::float16
                                                     : DType::bfloat16;

inline TensorMap encoded(MapGeometry geometry) {
    TensorMap map;
    geometry.address = on_gpu(geometry.address);
    check(encode_map(geometry, map));
    return map;
}

// Each question has a process of its own, so that a lost GPU is lost to that one alone.
inline void ask(const char* name, void (*question)()) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(15);
        try {
            question();
        } catch (const std::exception& error) {
            answer(name, error.what() == std::string("hangs") ? "hangs" : "fails", error.what());
        }
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (status != 0) answer(name, "dies", text("wait status %d", status));
}

}  // namespace fused_cna::probe
