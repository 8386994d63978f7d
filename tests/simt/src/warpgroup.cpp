#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include <simt/warpgroup.h>

namespace simt {

namespace {

constexpr int rows = 64;
constexpr int most_warpgroups = 1024 / warpgroup_lanes;

// CUDA C++ Programming Guide, "Compute Capabilities".
constexpr int registers_of_a_multiprocessor = 65536;

// PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16", "Accumulator D"; the same for k8. Calls visit(i, place) for
// accumulators 2 i and 2 i + 1, which are elements `place` and place + 1 of [64, n].
template <class Visit>
void visit_pairs(int lane, int n, Visit&& visit) {
    const int row = lane / 32 * 16 + lane % 32 / 4, column = lane % 4 * 2;
    for (int i = 0; i < n / 4; ++i) visit(i, (row + i % 2 * 8) * n + i / 2 * 8 + column);
}

bool same_bits(const float* a, const float* b, int count) { return std::memcmp(a, b, count * sizeof(float)) == 0; }

struct Nothing {};

}  // namespace

Warpgroup::Warpgroup(Scheduler& scheduler, const SharedMemory& shared, const AsyncProxy& proxy, int number)
    : shared_(shared),
      proxy_(proxy),
      name_("warpgroup " + std::to_string(number)),
      first_(number * warpgroup_lanes),
      group_(scheduler, name_, first_, warpgroup_lanes) {}

void Warpgroup::reset(int threads) {
    group_.reset(threads);
    sums_.clear();
    products_.clear();
    groups_.clear();
    uncommitted_ = 0;
    has_fenced_ = false;
}

void Warpgroup::report_unfinished(int thread) const {
    fail("thread " + std::to_string(thread) + " exited before " + name_ + " waited for its products of " +
         to_string(products_.back().sums->site));
}

void Warpgroup::multiply_async(ProductSlot mine, const Site& site) {
    collective(group_, site, mine, [&](Lanes<ProductSlot> lanes) { start(lanes, site); });
}

void Warpgroup::start(const Lanes<ProductSlot>& lanes, const Site& site) {
    const ProductSlot& first = lanes[0];
    for (int lane = 1; lane < warpgroup_lanes; ++lane) {
        const ProductSlot& other = lanes[lane];
        // "The contents of a matrix descriptor must be same across all the warps in the warpgroup."
        if (other.a != first.a || other.b != first.b || other.add != first.add || other.type != first.type ||
            other.n != first.n)
            fail(to_string(site) + ": threads " + std::to_string(first_) + " and " + std::to_string(first_ + lane) + " of " +
                 name_ + " differ in their descriptors, in whether they add, or in types");
    }
    const SharedMatrix a(first.a, rows, "a", shared_, site), b(first.b, first.n, "b", shared_, site);
    Sums& sums = take(lanes, site);
    sums.site = site;
    ++sums.pending;
    ++uncommitted_;
    products_.push_back({a, b, first.add, first.type, &sums});
}

// Finds the accumulators among those with pending products, or takes them over from their threads.
Warpgroup::Sums& Warpgroup::take(const Lanes<ProductSlot>& lanes, const Site& site) {
    const ProductSlot& first = lanes[0];
    const int count = first.n / 2;
    auto known = std::find_if(sums_.begin(), sums_.end(), [&](const Sums& sums) {
        const bool overlap = sums.d[0] < first.d + count && first.d < sums.d[0] + sums.n / 2;
        // "accumulator register accesses across multiple wgmma.mma_async instructions of the same shape" need no fence
        const bool same = sums.d[0] == first.d && sums.n == first.n;
        if (overlap && !same && sums.pending > 0)
            fail(to_string(site) +
                 " on accumulators of which some are pending for a product of another shape: " + to_string(sums.site));
        return same;
    });
    if (known != sums_.end() && known->pending > 0) {
        for (int lane = 0; lane < warpgroup_lanes; ++lane) {
            if (lanes[lane].d != known->d[lane]) fail(to_string(site) + " mixes two arrays of accumulators");
        }
        return *known;
    }
    if (known == sums_.end()) {
        known = sums_.insert(sums_.end(), {{}, first.n, std::vector<float>(rows * first.n), 0, site, true});
        if (!has_fenced_) check_fence(*known, first.add, site);
    }
    Sums& sums = *known;
    bool is_changed = false;
    for (int lane = 0; lane < warpgroup_lanes; ++lane) {
        float* d = sums.d[lane] = lanes[lane].d;
        visit_pairs(lane, sums.n, [&](int i, int place) {
            is_changed |= !same_bits(&sums.values[place], d + 2 * i, 2);
            std::memcpy(&sums.values[place], d + 2 * i, 2 * sizeof(float));
        });
        SharedMemory::poison(reinterpret_cast<std::byte*>(d), count * sizeof(float));
    }
    if (!sums.is_fenced && (is_changed || !first.add)) check_fence(sums, first.add, site);
    return sums;
}

// "wgmma.fence": it must be issued before the first wgmma.mma_async, and between a register access by a thread and any that
// accesses the same registers. A product that overwrites earlier sums needs one too: the threads have read them after their
// wait.
void Warpgroup::check_fence(const Sums& known, bool add, const Site& site) const {
    fail(to_string(site) + " without fence_products before it: " +
         (!has_fenced_ ? "it is the first of " + name_
                       : "the threads have " + std::string(add ? "written" : "had") + " its accumulators since " +
                             to_string(known.site)));
}

void Warpgroup::fence(const Site& site) {
    Nothing mine;
    collective(group_, site, mine, [&](Lanes<Nothing>) {
        has_fenced_ = true;
        for (Sums& sums : sums_) sums.is_fenced = true;
    });
}

void Warpgroup::commit(const Site& site) {
    Nothing mine;
    collective(group_, site, mine, [&](Lanes<Nothing>) {
        groups_.push_back(uncommitted_);
        uncommitted_ = 0;
    });
}

void Warpgroup::wait(int pending, const Site& site) {
    collective(group_, site, pending, [&](Lanes<int> lanes) {
        for (int lane = 1; lane < warpgroup_lanes; ++lane) {
            if (lanes[lane] != lanes[0]) fail(to_string(site) + " for differing numbers of groups in " + name_);
        }
        while (static_cast<int>(groups_.size()) > pending) finish_group();
    });
}

void Warpgroup::finish_group() {
    for (int i = 0; i < groups_.front(); ++i) {
        Product& product = products_.front();
        multiply_matrices(product.type, product.a, product.b, proxy_, product.add, product.sums->values.data());
        if (--product.sums->pending == 0) give_back(*product.sums);
        products_.pop_front();
    }
    groups_.pop_front();
}

void Warpgroup::give_back(Sums& sums) const {
    for (int lane = 0; lane < warpgroup_lanes; ++lane) {
        float* d = sums.d[lane];
        if (!SharedMemory::is_poison(reinterpret_cast<std::byte*>(d), sums.n / 2 * sizeof(float)))
            fail("thread " + std::to_string(first_ + lane) + " wrote its accumulators while " + to_string(sums.site) +
                 " on them was under way");
        visit_pairs(lane, sums.n, [&](int i, int place) { std::memcpy(d + 2 * i, &sums.values[place], 2 * sizeof(float)); });
    }
    sums.is_fenced = false;
}

Warpgroups::Warpgroups(Scheduler& scheduler, const SharedMemory& shared, const AsyncProxy& proxy)
    : registers_(most_warpgroups) {
    for (int i = 0; i < most_warpgroups; ++i) warpgroups_.emplace_back(scheduler, shared, proxy, i);
}

void Warpgroups::reset(int threads) {
    for (Warpgroup& warpgroup : warpgroups_) warpgroup.reset(threads);
    std::fill(registers_.begin(), registers_.end(), 0);
}

void Warpgroups::set_registers(int thread, int count, bool is_more, const Site& site) {
    if (count < 24 || count > 256 || count % 8 != 0)
        fail(to_string(site) + " to " + std::to_string(count) + ": it must be a multiple of 8 from 24 to 256");
    const int group = thread / warpgroup_lanes;
    collective(warpgroups_[group].lanes(), site, count, [&](Lanes<int> lanes) {
        for (int lane = 1; lane < warpgroup_lanes; ++lane) {
            if (lanes[lane] != count)
                fail(to_string(site) + " to " + std::to_string(count) + " registers by one thread of warpgroup " +
                     std::to_string(group) + ", to " + std::to_string(lanes[lane]) + " by another");
        }
        const int before = registers_[group];
        if (before != 0 && (is_more ? before > count : before < count))
            fail(to_string(site) + " to " + std::to_string(count) + " registers, but warpgroup " + std::to_string(group) +
                 " has " + std::to_string(before));
        registers_[group] = count;
        const int all = std::accumulate(registers_.begin(), registers_.end(), 0) * warpgroup_lanes;
        if (all > registers_of_a_multiprocessor)
            fail(to_string(site) + " to " + std::to_string(count) + " registers: with what the others have that is " +
                 std::to_string(all) + ", and a multiprocessor has 65536");
    });
}

}  // namespace simt
