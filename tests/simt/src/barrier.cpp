#include <algorithm>
#include <map>
#include <string_view>

#include <simt/barrier.h>
#include <simt/warp.h>

namespace simt {

namespace {

constexpr int barrier_count = 16;

bool same_place(const std::source_location& a, const std::source_location& b) {
    bool same_file = a.file_name() == b.file_name() || std::string_view(a.file_name()) == b.file_name();
    return same_file && a.line() == b.line() && a.column() == b.column();
}

std::string in_words(int threads) { return threads == 0 ? "the whole block" : std::to_string(threads) + " threads"; }

}  // namespace

void Barrier::wait_for(int threads, const Site& site) {
    // PTX ISA, "bar, barrier": a thread count must be a multiple of the warp size.
    if (threads <= 0 || threads % warp_lanes != 0 || threads > scheduler_.threads())
        fail(to_string(site) + " with " + std::to_string(threads) +
             " threads: the count must be a multiple of 32, at most the block's " + std::to_string(scheduler_.threads()));
    arrive(threads, site);
}

void Barrier::arrive(int threads, const Site& site) {
    int me = scheduler_.current().index;
    if (arrived_.empty()) {
        threads_ = threads;
        site_ = site;
    } else {
        check_agreement(threads, site);
    }
    arrived_.push_back(me);
    if (static_cast<int>(arrived_.size()) < wanted()) {
        scheduler_.park(*this, site);
    } else {
        release(me);
    }
}

void Barrier::check_agreement(int threads, const Site& site) const {
    // PTX ISA, "bar, barrier": the count says how many threads participate in this barrier, so they must agree on it.
    if (threads != threads_)
        fail("barrier with differing counts: " + meeting(site) + "; the first waits for " + in_words(threads_) +
             ", the second for " + in_words(threads));
    // CUDA C++ Programming Guide, "Synchronization Functions": __syncthreads() is allowed in conditional code only if the
    // conditional evaluates identically across the entire thread block. PTX's counted barriers have no such rule.
    if (threads == whole_block && !same_place(site.where, site_.where))
        fail("divergent barrier: " + meeting(site) + "; all threads of a block must reach the same sync_threads");
}

std::string Barrier::meeting(const Site& site) const {
    return "barrier " + std::to_string(id_) + " was reached first by thread " + std::to_string(arrived_.front()) + " at " +
           to_string(site_) + ", then by thread " + std::to_string(scheduler_.current().index) + " at " + to_string(site);
}

void Barrier::check_whole_warps() const {
    // PTX ISA, "bar, barrier": bar.sync is barrier.sync.aligned, which all threads of a warp must execute together.
    std::map<int, std::vector<int>> by_warp;
    for (int thread : arrived_) by_warp[thread / warp_lanes].push_back(thread);
    for (auto& [warp, present] : by_warp) {
        std::vector<int> absent;
        for (int i = warp * warp_lanes; i < std::min((warp + 1) * warp_lanes, scheduler_.threads()); ++i) {
            bool exited = scheduler_.thread(i).state == Thread::State::exited;
            if (!exited && std::find(present.begin(), present.end(), i) == present.end()) absent.push_back(i);
        }
        if (!absent.empty())
            fail("barrier " + std::to_string(id_) + " at " + to_string(site_) + " got its " + std::to_string(threads_) +
                 " threads, but of warp " + std::to_string(warp) + " " + list_of("thread", absent) +
                 " did not take part: a warp must arrive whole, and no more threads than the count may use the barrier");
    }
}

void Barrier::thread_exited() {
    if (!arrived_.empty() && threads_ == whole_block && static_cast<int>(arrived_.size()) >= wanted()) release(-1);
}

void Barrier::release(int running) {
    if (threads_ != whole_block) check_whole_warps();
    for (int thread : arrived_) {
        if (thread != running) scheduler_.wake(thread);
    }
    arrived_.clear();
}

void Barrier::reset() { arrived_.clear(); }

std::string Barrier::status() const {
    std::string text = "barrier " + std::to_string(id_) + " at " + to_string(site_) + ": " +
                       std::to_string(arrived_.size()) + " of " + std::to_string(wanted()) + " threads arrived";
    std::vector<int> missing;
    for (int i = 0; i < scheduler_.threads(); ++i) {
        bool here = std::find(arrived_.begin(), arrived_.end(), i) != arrived_.end();
        if (!here && (threads_ != whole_block || scheduler_.thread(i).state != Thread::State::exited)) missing.push_back(i);
    }
    return missing.empty() ? text : text + "; not there: " + list_of("thread", missing);
}

Barriers::Barriers(Scheduler& scheduler) {
    for (int id = 0; id < barrier_count; ++id) barriers_.emplace_back(scheduler, id);
}

Barrier& Barriers::named(int id) {
    if (id < 0 || id >= barrier_count)
        fail("named_barrier " + std::to_string(id) + ": a block has barriers 0 to " + std::to_string(barrier_count - 1));
    return barriers_[id];
}

void Barriers::reset() {
    for (Barrier& barrier : barriers_) barrier.reset();
}

}  // namespace simt
