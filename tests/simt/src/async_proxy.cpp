#include <algorithm>
#include <cstring>

#include <simt/async_proxy.h>

namespace simt {

void AsyncProxy::reset(int threads) {
    if (has_notes_) {
        for (Notes& notes : unpublished_) notes.ranges.clear();
    }
    if (static_cast<int>(unpublished_.size()) < threads) unpublished_.resize(threads);
    has_notes_ = false;
    is_poisoned_ = false;
}

std::byte* AsyncProxy::memory() const {
    if (!is_poisoned_) {
        memory_.resize(shared_.bytes());
        SharedMemory::poison(memory_.data(), shared_.bytes());
        is_poisoned_ = true;
    }
    return memory_.data();
}

void AsyncProxy::wrote(int thread, const std::byte* first, int64_t bytes) {
    has_notes_ = true;
    if (is_poisoned_) SharedMemory::poison(memory_.data() + (first - shared_.data()), bytes);
    Notes& notes = unpublished_[thread];
    const int32_t begin = static_cast<int32_t>(first - shared_.data()), end = begin + static_cast<int32_t>(bytes);
    if (!notes.ranges.empty() && notes.ranges.back().end == begin) {
        notes.ranges.back().end = end;
        return;
    }
    notes.ranges.push_back({begin, end});
    // A kernel that never fences writes the same addresses again and again.
    if (notes.ranges.size() >= notes.merge_at) merge(notes);
}

void AsyncProxy::merge(Notes& notes) {
    std::vector<Range>& ranges = notes.ranges;
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.first < b.first; });
    size_t last = 0;
    for (size_t i = 1; i < ranges.size(); ++i) {
        if (ranges[i].first <= ranges[last].end) {
            ranges[last].end = std::max(ranges[last].end, ranges[i].end);
        } else {
            ranges[++last] = ranges[i];
        }
    }
    ranges.resize(last + 1);
    notes.merge_at = std::max(fewest_to_merge, 2 * ranges.size());
}

void AsyncProxy::fence(int thread) {
    Notes& notes = unpublished_[thread];
    for (const Range& range : notes.ranges)
        std::memcpy(memory() + range.first, shared_.data() + range.first, range.end - range.first);
    notes.ranges.clear();
}

void AsyncProxy::poison(std::byte* first, int64_t bytes) {
    SharedMemory::poison(first, bytes);
    SharedMemory::poison(memory() + (first - shared_.data()), bytes);
}

void AsyncProxy::write(std::byte* destination, const void* source, int64_t bytes) {
    std::memcpy(destination, source, bytes);
    std::memcpy(memory() + (destination - shared_.data()), source, bytes);
}

}  // namespace simt
