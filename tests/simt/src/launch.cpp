// Launches: limits, the order of clusters, and reports that name the kernel.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>

#include <simt/block.h>
#include <simt/cluster.h>

namespace simt {

namespace {

std::mutex one_launch_at_a_time;
Cluster cluster;  // the one that is running
uint64_t launch_seed = 0;
std::function<void()> next_event;

std::mutex limits_in_use;
std::map<const void*, int64_t> shared_limits;

int64_t shared_limit(const void* kernel) {
    constexpr int64_t without_asking = 48 * 1024;
    const std::lock_guard lock(limits_in_use);
    const auto found = shared_limits.find(kernel);
    return found != shared_limits.end() ? found->second : without_asking;
}

std::string kernel_name(const void* address) {
    Dl_info info{};
    if (!dladdr(address, &info) || !info.dli_sname) return "a kernel";
    int status = 0;
    std::unique_ptr<char, decltype(&std::free)> text(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status),
                                                     &std::free);
    std::string name = status == 0 ? text.get() : info.dli_sname;
    return name.substr(0, name.find('('));
}

// Visits 0..count-1 in a pseudo-random order that needs no storage: i -> (offset + i * step) mod count.
class Order {
   public:
    Order(int64_t count, Random& random) : count_(count), offset_(random.below(static_cast<uint32_t>(count))) {
        do {
            step_ = 1 + random.below(static_cast<uint32_t>(count));
        } while (std::gcd(step_, count) != 1);
    }

    int64_t operator[](int64_t i) const { return (offset_ + i * step_) % count_; }

   private:
    int64_t count_, offset_, step_;
};

}  // namespace

void set_seed(uint64_t seed) { launch_seed = seed; }

void before_next_launch(std::function<void()> event) { next_event = std::move(event); }

const char* set_shared_limit(const void* kernel_address, int64_t bytes) {
    if (bytes < 0 || bytes > SharedMemory::limit_bytes)
        return "invalid argument: the limit of shared memory must be from 0 to 232448 bytes (227 KB)";
    const std::lock_guard lock(limits_in_use);
    shared_limits[kernel_address] = bytes;
    return nullptr;
}

const char* launch(const LaunchRequest& request, const std::function<void()>& kernel) {
    if (const auto event = std::exchange(next_event, nullptr)) event();
    if (request.blocks < 1 || request.blocks > max_blocks)
        return "invalid configuration argument: the number of blocks must be from 1 to 2147483647";
    if (request.threads < 1 || request.threads > max_threads)
        return "invalid configuration argument: the number of threads must be from 1 to 1024";
    if (request.shared_bytes < 0 || request.shared_bytes > shared_limit(request.kernel_address))
        return "invalid argument: dynamic shared memory beyond the kernel's limit, which is 232448 bytes (227 KB) at most";
    if (request.cluster < 1 || request.cluster > max_cluster || request.blocks % request.cluster != 0)
        return "invalid cluster size: a cluster must have from 1 to 8 blocks, and divide the number of blocks";
    static_assert(max_cluster == 8);
    static_assert(max_blocks == 2147483647 && max_threads == 1024 && SharedMemory::limit_bytes == 232448);

    std::lock_guard lock(one_launch_at_a_time);
    Random random(launch_seed);
    const Garbage garbage = launch_seed % 2 == 0 ? Garbage::nan : Garbage::finite;
    const int64_t clusters = request.blocks / request.cluster;
    const Order order(clusters, random);
    for (int64_t i = 0; i < clusters; ++i) {
        try {
            cluster.run(order[i] * request.cluster, request, garbage, random, kernel);
        } catch (const SimulatorError& error) {
            fail(kernel_name(request.kernel_address) + ", block " + std::to_string(block().index()) + " of " +
                 std::to_string(request.blocks) + ", seed " + std::to_string(launch_seed) + ": " + error.what());
        }
    }
    return nullptr;
}

}  // namespace simt
