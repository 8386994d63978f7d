#include <simt/report.h>
#include <cstring>

namespace simt {

void fail(const std::string& text) { throw SimulatorError(text); }

std::string to_string(const Site& site) {
    const char* path = site.where.file_name();
    const char* slash = std::strrchr(path, '/');
    return std::string(site.operation) + " (" + (slash ? slash + 1 : path) + ":" + std::to_string(site.where.line()) + ")";
}

std::string list_of(const char* noun, const std::vector<int>& numbers) {
    std::string text = std::string(noun) + (numbers.size() == 1 ? " " : "s ");
    for (size_t first = 0; first < numbers.size();) {
        size_t last = first;
        while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
        if (first > 0) text += ", ";
        text += std::to_string(numbers[first]);
        if (last > first) text += "-" + std::to_string(numbers[last]);
        first = last + 1;
    }
    return text;
}

}  // namespace simt
