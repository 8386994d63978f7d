#include <simt/cluster.h>

#include <string>

namespace simt {

void ClusterBarrier::wait(const Site& site) {
    Block& mine = block();
    if (arrived_.empty()) site_ = site;
    arrived_.emplace_back(&mine, mine.thread());
    if (static_cast<int>(arrived_.size()) < cluster_.live_threads()) {
        mine.scheduler.park(*this, site);
    } else {
        release(&mine);
    }
}

void ClusterBarrier::thread_exited() {
    if (!arrived_.empty() && static_cast<int>(arrived_.size()) >= cluster_.live_threads()) release(nullptr);
}

void ClusterBarrier::release(const Block* running) {
    for (const auto& [block, thread] : arrived_) {
        if (block != running || thread != running->thread()) block->scheduler.wake(thread);
    }
    arrived_.clear();
}

std::string ClusterBarrier::status() const {
    return "the cluster's barrier at " + to_string(site_) + ": " + std::to_string(arrived_.size()) + " of " +
           std::to_string(cluster_.live_threads()) + " threads arrived";
}

void Cluster::run(int64_t first, const LaunchRequest& request, Garbage garbage, Random& random,
                  const std::function<void()>& kernel) {
    size_ = request.cluster;
    while (static_cast<int>(blocks_.size()) < size_)
        blocks_.push_back(std::make_unique<Block>(*this, static_cast<int>(blocks_.size())));
    barrier.reset();
    prerequisites.begin(request.starts_early);
    const struct AtExit {
        Prerequisites& prerequisites;
        ~AtExit() { prerequisites.put_back(); }
    } at_exit{prerequisites};
    for (int rank = 0; rank < size_; ++rank) {
        block(rank).start({.index = first + rank,
                           .grid = request.blocks,
                           .threads = request.threads,
                           .shared_bytes = request.shared_bytes,
                           .garbage = garbage,
                           .seed = random.next(),
                           .kernel = &kernel});
    }
    advance(random);
    if (prerequisites.are_pending()) {
        prerequisites.end();
        advance(random);
    }
    if (live_threads() > 0) fail("deadlock: no thread can go on" + standing());
}

void Cluster::advance(Random& random) {
    if (size_ > 1) return interleave(Random(random.next()));
    block(0).run();
}

void Cluster::interleave(Random random) {
    // Usually any block may be next. In a quarter of the runs one block runs on as far as it can, and so gets far ahead.
    const bool one_ahead = random.below(4) == 0;
    int rank = 0;
    while (true) {
        std::vector<int> able;
        for (int i = 0; i < size_; ++i) {
            if (block(i).is_running() && block(i).can_step()) able.push_back(i);
        }
        if (able.empty()) return;
        const bool stay = one_ahead && block(rank).is_running() && block(rank).can_step();
        if (!stay) rank = able[random.below(static_cast<uint32_t>(able.size()))];
        block(rank).step();
    }
}

int Cluster::live_threads() const {
    int live = 0;
    for (int rank = 0; rank < size_; ++rank) live += block(rank).scheduler.live();
    return live;
}

std::string Cluster::standing() const {
    std::string text;
    for (int rank = 0; rank < size_; ++rank) {
        if (size_ > 1) text += "\n  block " + std::to_string(rank) + " of the cluster:";
        text += block(rank).scheduler.standing();
    }
    return text;
}

const std::byte* Cluster::at(int rank, uint32_t address, int bytes, const Site& site) const {
    if (rank < 0 || rank >= size_)
        fail(to_string(site) + " of block " + std::to_string(rank) + " of a cluster of " + std::to_string(size_));
    const Block& owner = block(rank);
    if (!owner.is_running())
        fail(to_string(site) + " of block " + std::to_string(rank) +
             " of the cluster, all of whose threads have exited: its shared memory is gone");
    return owner.shared.at(address, bytes, site);
}

}  // namespace simt
