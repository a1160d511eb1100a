// Large tensors of the CPU in one range of addresses, best fit, freed neighbours joined, pages never returned.
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

constexpr size_t GRAIN = 4096;          // sizes are multiples of it, so every block is aligned to it
constexpr size_t HUGE_PAGE = 1 << 21;
constexpr size_t LEAST = 1 << 20;       // smaller tensors go to malloc

class Arena {
public:
    // Addresses, no memory: a page comes when it is first written to. False where there are not as many.
    bool reserve(size_t size) {
        void* const at = mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) return false;
        first = ((uintptr_t)at + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, capacity = size;
        madvise((void*)first, capacity, MADV_HUGEPAGE);
        return true;
    }

    // At least `size` bytes, or null where the range is full.
    void* take(size_t size) {
        size = (size + GRAIN - 1) / GRAIN * GRAIN;
        const std::lock_guard<std::mutex> alone(mutex);
        size_t place;
        if (const auto fit = by_size.lower_bound({size, 0}); fit != by_size.end()) {
            const auto [whole, start] = *fit;
            place = start;
            leave(start, whole);
            if (whole > size) add(start + size, whole - size);
        } else {  // beyond all that was ever taken, beginning with what lies free there
            const auto last = idle.empty() ? idle.end() : std::prev(idle.end());
            const bool adjoins = last != idle.end() && last->first + last->second == top;
            place = adjoins ? last->first : top;
            if (size > capacity - place) return nullptr;
            if (adjoins) leave(last->first, last->second);
            top = place + size;
        }
        taken[place] = size;
        return (void*)(first + place);
    }

    bool owns(const void* at) const { return (uintptr_t)at - first < capacity; }

    void give_back(const void* at) {
        const std::lock_guard<std::mutex> alone(mutex);
        const auto mine = taken.find((uintptr_t)at - first);
        size_t place = mine->first, size = mine->second;
        taken.erase(mine);
        if (const auto next = idle.find(place + size); next != idle.end()) {
            const size_t more = next->second;
            leave(place + size, more);
            size += more;
        }
        if (const auto after = idle.lower_bound(place); after != idle.begin()) {
            const auto [start, length] = *std::prev(after);
            if (start + length == place) {
                leave(start, length);
                place = start, size += length;
            }
        }
        add(place, size);
    }

private:
    void add(size_t place, size_t size) { idle[place] = size, by_size.insert({size, place}); }
    void leave(size_t place, size_t size) { idle.erase(place), by_size.erase({size, place}); }

    std::mutex mutex;
    uintptr_t first = 0;
    size_t capacity = 0, top = 0;                    // beyond top nothing was ever taken
    std::map<size_t, size_t> idle;                   // place -> size
    std::set<std::pair<size_t, size_t>> by_size;     // the same, (size, place)
    std::unordered_map<size_t, size_t> taken;        // place -> size
};

Arena* const arena = new Arena;  // never destroyed: tensors may be freed while the process ends

void release(void* at) {
    if (arena->owns(at)) arena->give_back(at);
    else c10::free_cpu(at);
}

class FromArena final : public c10::Allocator {
public:
    c10::DataPtr allocate(size_t size) override {
        void* at = size < LEAST ? nullptr : arena->take(size);
        if (at == nullptr) at = c10::alloc_cpu(size);
        return {at, at, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};

}  // namespace

// From now on torch's tensors on the CPU come from a range of so many bytes; 0 where it cannot be had.
extern "C" int use_arena(size_t size) {
    if (!arena->reserve(size)) return 0;
    c10::SetCPUAllocator(new FromArena, 1);
    return 1;
}
