#include <simt/block.h>

namespace simt {

Block block;

Block::Block() : barriers(scheduler), copies(shared) {
    for (int first = 0; first < max_threads; first += warp_lanes)
        warps_.emplace_back(scheduler, "warp " + std::to_string(first / warp_lanes), first, warp_lanes);
}

void Block::run(int64_t index, int64_t grid, int threads, int64_t shared_bytes, uint64_t seed,
                const std::function<void()>& kernel) {
    index_ = index;
    grid_ = grid;
    kernel_ = &kernel;
    barriers.reset();
    for (LaneGroup& warp : warps_) warp.reset(threads);
    shared.begin_block(shared_bytes);
    copies.reset(threads);
    scheduler.run(threads, &Block::run_thread, &Block::thread_exited, seed);
    copies.check_never_landed();
    shared.check_redzone();
}

void Block::run_thread() { (*block.kernel_)(); }

void Block::thread_exited() {
    block.warp().thread_exited(block.thread());
    block.barriers.block().thread_exited();
}

}  // namespace simt
