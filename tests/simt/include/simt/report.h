#pragma once
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

// What the simulated kernel did wrong; the text is the whole report.
struct SimulatorError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a thread executes and where in the kernel's source.
struct Site {
    const char* operation;
    std::source_location where;
};

// Something that threads wait for.
class Waitable {
   public:
    // One line for a deadlock report: what it is and how far it got.
    virtual std::string status() const = 0;

   protected:
    ~Waitable() = default;
};

[[noreturn]] void fail(const std::string& text);

// "sync_threads (direct.cu:120)"
std::string to_string(const Site& site);

// "thread 3", "threads 0-31, 40"; `numbers` ascending.
std::string list_of(const char* noun, const std::vector<int>& numbers);

}  // namespace simt
