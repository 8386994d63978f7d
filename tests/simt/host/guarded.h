#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string_view>

#include <simt/report.h>

namespace simt {

// What a C function of the simulator returns; the order is known to binding.py.
enum Status : int { succeeded, launch_refused, kernel_at_fault, failed };

// Where such a function puts the text of what went wrong, with a terminating zero, cut to size.
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

// Calls function(), which returns null or a launch error; exceptions end here, as the caller is C.
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
