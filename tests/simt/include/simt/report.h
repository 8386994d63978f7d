// Reports of what a simulated kernel does wrong, and of where its threads wait.
#pragma once
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

// A fault of the simulated kernel; the text is the whole report.
struct SimulatorError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a thread executes, and where in the kernel's source.
struct Site {
    const char* operation;
    std::source_location where;
};

// Something that threads wait for.
class Waitable {
   public:
    // One line for a deadlock report: what it is and its state.
    virtual std::string status() const = 0;

   protected:
    ~Waitable() = default;
};

[[noreturn]] void fail(const std::string& text);

// "sync_threads (direct.cu:120)"
std::string to_string(const Site& site);

// For example "thread 3" or "threads 0-31, 40"; `numbers` must be ascending.
std::string list_of(const char* noun, const std::vector<int>& numbers);

}  // namespace simt
