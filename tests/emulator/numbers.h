/* SPDX-License-Identifier: MIT */
/* Numbers as tensor cores read them. */
#ifndef EMULATOR_NUMBERS_H
#define EMULATOR_NUMBERS_H

#include <cstdint>
#include <cstring>

namespace emulator {

template <class To, class From> To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline uint32_t load_word(const void *from) {
    uint32_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

/* The low or the high of two bf16 numbers. */
inline float half_of_bf16(uint32_t pair, bool high) {
    return bits_as<float>(high ? pair & 0xffff0000u : pair << 16);
}

} // namespace emulator

#endif
