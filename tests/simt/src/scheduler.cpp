#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include <simt/scheduler.h>
#include <simt/warp.h>

namespace simt {

void Scheduler::start(int threads, Body body, Body exited, uint64_t seed) {
    body_ = body;
    exited_ = exited;
    failure_ = nullptr;
    while (static_cast<int>(threads_.size()) < threads)
        threads_.push_back(std::make_unique<Thread>(static_cast<int>(threads_.size())));
    random_ = Random(seed);
    // Usually any thread may be next. In a quarter of the runs the most recently released thread runs first, so that some
    // threads get far ahead of others.
    newest_first_ = random_.below(4) == 0;
    // Usually effects land between switches. In a quarter of the runs they land only when no thread can go on without them,
    // so that a thread that does not wait is sure to be early.
    effects_last_ = random_.below(4) == 0;
    count_ = live_ = threads;
    effects_.clear();
    ready_.clear();
    for (int i = 0; i < threads; ++i) {
        threads_[i]->state = Thread::State::ready;
        threads_[i]->fiber.start(&Scheduler::enter, this);
        ready_.push_back(i);
    }
    random_.shuffle(ready_);
}

void Scheduler::step() {
    constexpr uint32_t switches_per_effect = 16;
    const bool may_land = ready_.empty() || (!effects_last_ && random_.below(switches_per_effect) == 0);
    if (!effects_.empty() && may_land) return land_an_effect();
    current_ = &take_ready();
    current_->fiber.resume();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Scheduler::run() {
    while (live_ > 0 && can_step()) step();
}

void Scheduler::finish() {
    while (!effects_.empty()) land_an_effect();
}

void Scheduler::enter(void* scheduler) {
    Scheduler& self = *static_cast<Scheduler*>(scheduler);
    Thread& me = self.current();
    try {
        self.body_();
        me.state = Thread::State::exited;
        --self.live_;
        self.exited_();
    } catch (...) {
        self.failure_ = std::current_exception();
    }
}

Thread& Scheduler::take_ready() {
    if (!newest_first_) std::swap(ready_[random_.below(static_cast<uint32_t>(ready_.size()))], ready_.back());
    Thread& taken = *threads_[ready_.back()];
    ready_.pop_back();
    return taken;
}

void Scheduler::park(const Waitable& waits_on, const Site& site) {
    Thread& me = *current_;
    me.state = Thread::State::waiting;
    me.waits_on = &waits_on;
    me.site = site;
    me.fiber.suspend();
}

void Scheduler::wake(int thread) {
    threads_[thread]->state = Thread::State::ready;
    ready_.push_back(thread);
}

void Scheduler::later(std::function<void()> effect) { effects_.push_back(std::move(effect)); }

void Scheduler::land_an_effect() {
    std::swap(effects_[random_.below(static_cast<uint32_t>(effects_.size()))], effects_.back());
    std::function<void()> effect = std::move(effects_.back());
    effects_.pop_back();
    effect();
}

std::string Scheduler::standing() const {
    std::string text;
    std::set<const Waitable*> described;
    for (int i = 0; i < count_; ++i) {
        const Thread& t = *threads_[i];
        if (t.state == Thread::State::waiting && described.insert(t.waits_on).second) text += "\n  " + t.waits_on->status();
    }
    for (int first = 0; first < count_; first += warp_lanes) {
        std::map<std::string, std::vector<int>> standing;
        for (int i = first; i < std::min(first + warp_lanes, count_); ++i) {
            const Thread& t = *threads_[i];
            standing[t.state == Thread::State::exited ? "exited" : "at " + to_string(t.site)].push_back(i);
        }
        text += "\n  warp " + std::to_string(first / warp_lanes) + ":";
        const char* separator = " ";
        for (const auto& [where, numbers] : standing) {
            text += separator + list_of("thread", numbers) + " " + where;
            separator = "; ";
        }
    }
    return text;
}

}  // namespace simt
