#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// AddressSanitizer's interface for code that switches stacks and manages memory itself; does nothing in other builds.
namespace simt::sanitizer {

#if defined(__SANITIZE_ADDRESS__)

constexpr bool enabled = true;

inline void start_switch(void** own_fake_stack, const void* target_bottom, size_t target_size) {
    __sanitizer_start_switch_fiber(own_fake_stack, target_bottom, target_size);
}

inline void finish_switch(void* own_fake_stack, const void** left_bottom, size_t* left_size) {
    __sanitizer_finish_switch_fiber(own_fake_stack, left_bottom, left_size);
}

inline void poison(const void* address, size_t bytes) { __asan_poison_memory_region(address, bytes); }
inline void unpoison(const void* address, size_t bytes) { __asan_unpoison_memory_region(address, bytes); }

#else

constexpr bool enabled = false;

inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}

#endif

}  // namespace simt::sanitizer
