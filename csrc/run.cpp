#include "run.h"

#include <stdexcept>
#include <string>

namespace fused_cna {

void run(const ConvArgs& args, const Plan& plan, Stream stream) {
    if (plan.blocks == 0) return;
    const char* error = nullptr;
    switch (plan.kernel) {
        case Kernel::direct: error = launch_direct(args, plan, stream); break;
    }
    if (error) {
        throw std::runtime_error("fused_cna: launching " + to_string(plan) + " failed: " + error + " (" +
                                 to_string(args.problem) + ")");
    }
}

}  // namespace fused_cna
