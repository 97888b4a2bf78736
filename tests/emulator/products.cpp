/* SPDX-License-Identifier: MIT */
#include "products.h"

#include "block.h"
#include "numbers.h"

#include <algorithm>
#include <deque>
#include <utility>
#include <vector>

namespace emulator {

namespace {

constexpr int DEPTH = 16, ROWS = 16 /* of d, of a warp */, MAX_COLUMNS = 128;

struct Thread {
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
};
Thread threads[MAX_THREADS];

/* Element [i][k] of an operand in shared memory. PTX ISA, "Shared Memory Matrix Layout": eight rows of `width` bytes make an
 * atom, whose 16-byte pieces are swizzled by the bits of the address above them. */
float element(uint64_t descriptor, bool across, int i, int k) {
    uint32_t start = (uint32_t)(descriptor & 0x3fff) << 4, leading = (uint32_t)(descriptor >> 16 & 0x3fff) << 4,
             stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
    int swizzle = (int)(descriptor >> 62);
    if (swizzle != 1 && swizzle != 2)
        fail("an operand of wgmma with swizzle %d; expected 1 (128 bytes) or 2 (64)", swizzle);
    int width = swizzle == 1 ? 128 : 64, row = across ? k : i, column = across ? i : k, panel = width / 2;
    if (column / panel && !(across && leading))
        fail("an operand of wgmma reads a second panel without an offset to it");
    uint32_t address = start + (uint32_t)(column / panel) * leading + (uint32_t)(row / 8) * stride +
                       (uint32_t)(row % 8 * width + column % panel * 2);
    address ^= (address >> 7 & (swizzle == 1 ? 7 : 3)) << 4;
    return half_of_bf16(load_word(shared_pointer(address & ~3u, 4)), address / 2 % 2);
}

void multiply(const Product *const (&lanes)[LANES], int warp) {
    static float a[ROWS][DEPTH], b[DEPTH][MAX_COLUMNS];
    const Product &one = *lanes[0];
    for (const Product *p : lanes)
        if (p->a != one.a || p->b != one.b || p->tiles != one.tiles)
            fail("the lanes of a warp ask for different products");
    for (int k = 0; k < DEPTH; k++) {
        for (int n = 0; n < one.tiles * 8; n++)
            b[k][n] = element(one.b, one.b_across, n, k);
        for (int m = 0; m < ROWS; m++)
            a[m][k] = one.a_in_registers
                          ? half_of_bf16(lanes[m % 8 * 4 + k % 8 / 2]->a_registers[k / 8 * 2 + m / 8], k % 2)
                          : element(one.a, one.a_across, warp % 4 * ROWS + m, k);
    }
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < one.tiles * 4; i++) {
            const Product &p = *lanes[lane];
            int m = lane / 4 + i % 4 / 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float sum = 0;
            for (int k = 0; k < DEPTH; k++)
                sum += a[m][k] * b[k][n];
            p.d[i] = (p.accumulate ? p.d[i] : 0) + (p.negative ? -sum : sum);
        }
}

void multiply_groups(Thread *const *lanes, int warp, int pending) {
    size_t count = lanes[0]->groups.size(), left = std::min(count, (size_t)pending);
    for (int lane = 0; lane < LANES; lane++)
        if (lanes[lane]->groups.size() != count)
            fail("the lanes of a warp have different numbers of groups of products");
    for (; count > left; count--) {
        for (size_t i = 0; i < lanes[0]->groups.front().size(); i++) {
            const Product *products[LANES];
            for (int lane = 0; lane < LANES; lane++)
                products[lane] = &lanes[lane]->groups.front().at(i);
            multiply(products, warp);
        }
        for (int lane = 0; lane < LANES; lane++)
            lanes[lane]->groups.pop_front();
    }
}

} // namespace

void add_product(const Product &product) { threads[thread_index.x].open.push_back(product); }

void commit_products() {
    Thread &mine = threads[thread_index.x];
    mine.groups.push_back(std::exchange(mine.open, {}));
}

void wait_for_products(int pending) {
    int warp = (int)thread_index.x / LANES;
    together(threads[thread_index.x], [=](Thread *const *lanes) { multiply_groups(lanes, warp, pending); });
}

void check_thread_end() {
    if (!threads[thread_index.x].open.empty() || !threads[thread_index.x].groups.empty())
        fail("a thread ended without waiting for its products");
}

} // namespace emulator
