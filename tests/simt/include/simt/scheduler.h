// The threads of one block: which runs next, deadlocks, asynchronous effects.
#pragma once
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <simt/fiber.h>
#include <simt/random.h>
#include <simt/report.h>

namespace simt {

// One thread of a block.
struct Thread {
    enum class State : uint8_t { ready, waiting, exited };

    explicit Thread(int index) : index(index), fiber(index) {}

    int index;
    State state = State::exited;
    Site site{};                         // where it waits
    const Waitable* waits_on = nullptr;  // what it waits for
    Fiber fiber;
};

// Runs the threads of one block in an order drawn from the seed. It switches only where a thread parks or exits.
class Scheduler {
   public:
    using Body = void (*)();

    // From now on step() runs `body` once per thread until all have exited; each thread calls `exited` afterwards. Abandons
    // whatever ran here before.
    void start(int threads, Body body, Body exited, uint64_t seed);

    // If false while threads live, something outside must wake one; otherwise it is a deadlock.
    bool can_step() const { return !ready_.empty() || !effects_.empty(); }

    // Runs a thread until it parks or exits, or lands an effect. Rethrows an exception that the thread threw.
    void step();

    // Steps until all threads have exited or none can go on.
    void run();

    // Once all threads have exited: lands the remaining effects.
    void finish();

    // What the threads wait for and where they are: a line for each thing and each warp.
    std::string standing() const;

    Thread& current() const { return *current_; }
    const Thread& thread(int index) const { return *threads_[index]; }
    int threads() const { return count_; }
    int live() const { return live_; }

    // Suspends the current thread until wake().
    void park(const Waitable& waits_on, const Site& site);
    void wake(int thread);

    // An asynchronous effect, such as a copy by another unit of the hardware: it happens at some later switch, at the latest
    // when no thread can go on without it. Effects may land out of order.
    void later(std::function<void()> effect);

   private:
    static void enter(void* scheduler);
    Thread& take_ready();
    void land_an_effect();

    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<int> ready_;
    std::vector<std::function<void()>> effects_;
    Thread* current_ = nullptr;
    Body body_ = nullptr;
    Body exited_ = nullptr;
    std::exception_ptr failure_;
    Random random_;
    int count_ = 0;
    int live_ = 0;
    bool newest_first_ = false, effects_last_ = false;
};

}  // namespace simt
