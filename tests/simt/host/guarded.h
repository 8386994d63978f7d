// Turns exceptions into a status and a text, for C callers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string_view>

#include <simt/report.h>

namespace simt {

// The result of the simulator's C functions; binding.py has the same order.
enum Status : int { succeeded, launch_refused, kernel_at_fault, failed };

// Where such a function writes its error message: zero-terminated, truncated to size.
struct ErrorText {
    char* text;
    int64_t size;
};

inline Status report(const ErrorText& error, Status status, std::string_view text) {
    size_t length = std::min(text.size(), static_cast<size_t>(error.size - 1));
    std::memcpy(error.text, text.data(), length);
    error.text[length] = 0;
    return status;
}

// Calls function(), which returns null or a launch error. Catches all exceptions, as the caller is C.
template <class Function>
Status guarded(const ErrorText& error, Function&& function) {
    try {
        const char* refused = function();
        return refused ? report(error, launch_refused, refused) : succeeded;
    } catch (const SimulatorError& e) {
        return report(error, kernel_at_fault, e.what());
    } catch (const std::exception& e) {
        return report(error, failed, e.what());
    }
}

}  // namespace simt
