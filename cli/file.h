/* SPDX-License-Identifier: MIT */
/* Whole files: read into memory, and written so that a reader sees the old one or the complete new one. */
#ifndef FLASHKDA_FILE_H
#define FLASHKDA_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Reads a regular file, or standard input where path is "-". *data is freed by the caller and never NULL on success. On failure returns false,
 * with failure(). */
bool file_read(const char *path, uint8_t **data, size_t *size);

/* A file on its way: its bytes go to a temporary file beside path until it is complete. "-" is standard output. */
struct new_file {
    char *path;      /* the file to replace, symbolic links followed */
    char *temporary; /* in the same directory; NULL: standard output */
    mode_t mode;     /* that of the file to replace, or of any new file */
    int descriptor;
    int failure; /* the first errno of a write; later writes do nothing */
};

/* On failure returns false, with failure(), and leaves nothing behind. */
bool new_file_open(struct new_file *file, const char *path);

/* Appends; a failure is kept for new_file_commit(). */
void new_file_write(struct new_file *file, const void *data, size_t size);

/* Brings the bytes to the disk and puts the file in its place, or removes the temporary file, returns false,
 * with failure(). Frees what new_file_open() allocated either way. */
bool new_file_commit(struct new_file *file);

/* Gives it up, and frees likewise. */
void new_file_cancel(struct new_file *file);

/* Removes the temporary file that is being written; for a signal handler that ends the program. */
void new_file_abandon(void);

/* Is this "-"? */
bool is_stream(const char *path);

/* Do two names lead to one file? */
bool same_file(const char *a, const char *b);

#endif
