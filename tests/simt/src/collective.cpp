#include <algorithm>
#include <string_view>

#include <simt/collective.h>

namespace simt {

LaneGroup::LaneGroup(Scheduler& scheduler, std::string name, int first, int lanes)
    : scheduler_(scheduler), name_(std::move(name)), first_(first), lanes_(lanes), operands_(lanes) {}

void LaneGroup::reset(int threads) {
    present_ = std::clamp(threads - first_, 0, lanes_);
    if (arrived_ > 0) std::fill(operands_.begin(), operands_.end(), nullptr);
    arrived_ = 0;
    exited_ = 0;
}

namespace {

// Compares pointers first: lanes are mostly at the same call.
bool same_operation(const Site& a, const Site& b) {
    return a.operation == b.operation || std::string_view(a.operation) == b.operation;
}

}  // namespace

bool LaneGroup::arrive(const Site& site, const std::type_info& kind, void* operands) {
    int me = scheduler_.current().index;
    check_complete(site);
    if (arrived_ == 0) {
        site_ = site;
        kind_ = &kind;
    } else if (!same_operation(site, site_) || kind != *kind_) {
        fail("divergent collective in " + name_ + ": thread " + std::to_string(me) + " is at " + to_string(site) +
             " while " + list_of("thread", lanes_at(true)) + " reached " + to_string(site_) +
             (kind == *kind_ ? "" : "; their operands or types differ"));
    }
    operands_[me - first_] = operands;
    return ++arrived_ == lanes_;
}

void LaneGroup::check_complete(const Site& site) const {
    if (present_ < lanes_)
        fail(to_string(site) + " needs all " + std::to_string(lanes_) + " lanes, but " + name_ + " has only " +
             std::to_string(present_) + " threads");
    if (exited_ == 0) return;
    std::vector<int> exited;
    for (int thread = first_; thread < first_ + present_; ++thread) {
        if (scheduler_.thread(thread).state == Thread::State::exited) exited.push_back(thread);
    }
    fail(to_string(site) + " needs all " + std::to_string(lanes_) + " lanes of " + name_ + ", but " +
         list_of("thread", exited) + " exited");
}

void LaneGroup::release() {
    int me = scheduler_.current().index;
    arrived_ = 0;
    for (int lane = 0; lane < lanes_; ++lane) {
        operands_[lane] = nullptr;
        if (first_ + lane != me) scheduler_.wake(first_ + lane);
    }
}

std::string LaneGroup::status() const {
    return name_ + " at " + to_string(site_) + ": " + std::to_string(arrived_) + " of " + std::to_string(lanes_) +
           " lanes arrived; not there: " + list_of("thread", lanes_at(false));
}

std::vector<int> LaneGroup::lanes_at(bool arrived) const {
    std::vector<int> threads;
    for (int lane = 0; lane < present_; ++lane) {
        if ((operands_[lane] != nullptr) == arrived) threads.push_back(first_ + lane);
    }
    return threads;
}

}  // namespace simt
