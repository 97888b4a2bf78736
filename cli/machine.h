/* SPDX-License-Identifier: MIT */
/* The machine this runs on. */
#ifndef FLASHKDA_MACHINE_H
#define FLASHKDA_MACHINE_H

struct machine {
    char cpu[128];         /* model name, or the architecture where the kernel does not tell */
    char architecture[65]; /* "x86_64", "aarch64" */
    char features[256];    /* of the vector instructions that matter here, in the kernel's spelling */
    int processors;        /* of the machine */
    int threads;           /* that the library takes by default */
};

void machine_describe(struct machine *machine);

/* The rate of a large copy within memory by all of so many threads, bytes read and written a second; 0 if out of memory. */
double machine_copy_rate(int threads);

#endif
