#include <simt/block.h>
#include <simt/cluster.h>

namespace simt {

Block::Block(Cluster& cluster, int rank)
    : barriers(scheduler),
      proxy(shared),
      copies(shared, proxy),
      phases(scheduler, shared),
      warpgroups(scheduler, shared, proxy),
      cluster_(cluster),
      rank_(rank) {
    for (int first = 0; first < max_threads; first += warp_lanes)
        warps_.emplace_back(scheduler, "warp " + std::to_string(first / warp_lanes), first, warp_lanes);
}

void Block::start(const BlockWork& work) {
    detail::block_at_work = this;
    work_ = work;
    barriers.reset();
    for (LaneGroup& warp : warps_) warp.reset(work.threads);
    warpgroups.reset(work.threads);
    phases.reset();
    shared.begin_block(work.shared_bytes, work.garbage);
    proxy.reset(work.threads);
    copies.reset(work.threads);
    tensor_copies.reset(work.threads);
    scheduler.start(work.threads, &Block::run_thread, &Block::thread_exited, work.seed);
}

void Block::step() {
    detail::block_at_work = this;
    scheduler.step();
    finish_if_ended();
}

void Block::run() {
    detail::block_at_work = this;
    scheduler.run();
    finish_if_ended();
}

void Block::finish_if_ended() {
    if (is_running()) return;
    cluster_.prerequisites.check_waited(rank_);
    scheduler.finish();
    copies.check_never_landed();
    tensor_copies.check_end();
    shared.check_redzone();
}

void Block::run_thread() { (*block().work_.kernel)(); }

void Block::thread_exited() {
    Block& mine = block();
    mine.warp().thread_exited();
    mine.warpgroup().thread_exited(mine.thread());
    mine.barriers.block().thread_exited();
    mine.cluster_.barrier.thread_exited();
}

}  // namespace simt
