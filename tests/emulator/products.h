/* SPDX-License-Identifier: MIT */
/* wgmma: products of a warpgroup in the background. They read their operands and write d when they are waited for. */
#ifndef EMULATOR_PRODUCTS_H
#define EMULATOR_PRODUCTS_H

#include <cstdint>

namespace emulator {

/* d [64][8 tiles] = or +=  +-a [64][16] b [16][8 tiles], as one thread of the warpgroup asks for it. Operands in shared
 * memory are given by descriptors: of rows of K elements, or, `across`, of rows of M or N. */
struct Product {
    bool a_in_registers, a_across, b_across, accumulate, negative;
    int tiles;
    uint32_t a_registers[4];
    uint64_t a, b;
    float *d;
};

void add_product(const Product &product);
void commit_products();
void wait_for_products(int pending);

/* A thread ends: all its products must have been waited for. */
void check_thread_end();

} // namespace emulator

#endif
