#include "plan/device.h"

#include <charconv>
#include <stdexcept>
#include <string>

namespace fused_cna {

DeviceInfo find_device(std::string_view name) {
    const std::string_view whole = name.substr(0, name.find('/'));
    std::string known;
    for (const NamedDevice& device : named_devices) {
        known += (known.empty() ? "" : ", ") + std::string(device.name);
        if (device.name != whole) continue;
        DeviceInfo info = device.info;
        if (whole == name) return info;
        const std::string_view part = name.substr(whole.size() + 1);
        int number = 0;
        const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), number);
        if (error == std::errc() && end == part.data() + part.size() && number >= 1 && number <= info.multiprocessors) {
            info.multiprocessors = number;
            return info;
        }
        throw std::invalid_argument("device '" + std::string(name) + "' wants a part of " + std::string(whole) +
                                    " with 1 to " + std::to_string(info.multiprocessors) + " multiprocessors");
    }
    throw std::invalid_argument("no device is called '" + std::string(name) + "'; known are " + known);
}

}  // namespace fused_cna
