/* SPDX-License-Identifier: MIT */
/* Whole files: read into memory, and written so that a reader sees the old one or the complete new one. */
#include "file.h"

#include "failure.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Reads size bytes or up to the end of the file; returns how many, or -1. */
static ssize_t read_fully(int descriptor, uint8_t *data, size_t size) {
    size_t done = 0;
    while (done < size) {
        ssize_t n = read(descriptor, data + done, size - done);
        if (n == 0)
            break;
        if (n < 0 && errno != EINTR)
            return -1;
        done += n > 0 ? (size_t)n : 0;
    }
    return (ssize_t)done;
}

static bool read_regular(int descriptor, const char *path, uint8_t **data, size_t *size) {
    struct stat about;
    if (fstat(descriptor, &about) != 0)
        return failed("%s: %s", path, strerror(errno));
    if (!S_ISREG(about.st_mode))
        return failed("%s: not a regular file", path);
    *size = (size_t)about.st_size;
    *data = malloc(*size + 1);
    if (!*data)
        return failed("%s: out of memory for its %zu bytes", path, *size);
    ssize_t got = read_fully(descriptor, *data, *size);
    if (got < 0 || (size_t)got != *size) {
        failed("%s: %s", path, got < 0 ? strerror(errno) : "became shorter while read");
        free(*data);
        return false;
    }
    return true;
}

bool is_stream(const char *path) { return strcmp(path, "-") == 0; }

bool same_file(const char *a, const char *b) {
    struct stat left, right;
    return stat(a, &left) == 0 && stat(b, &right) == 0 && left.st_dev == right.st_dev &&
           left.st_ino == right.st_ino;
}

static bool read_stream(int descriptor, uint8_t **data, size_t *size) {
    size_t room = (size_t)1 << 16;
    *data = NULL;
    *size = 0;
    for (ssize_t got = 1; got > 0; *size += got > 0 ? (size_t)got : 0) {
        room = *size == room ? 2 * room : room;
        uint8_t *more = realloc(*data, room);
        got = more ? read_fully(descriptor, more + *size, room - *size) : -1;
        if (got < 0) {
            failed("standard input: %s", more ? strerror(errno) : "out of memory");
            free(more ? more : *data);
            return false;
        }
        *data = more;
    }
    return true;
}

bool file_read(const char *path, uint8_t **data, size_t *size) {
    if (is_stream(path))
        return read_stream(STDIN_FILENO, data, size);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* no wait for the writer of a pipe */
    if (descriptor < 0)
        return failed("%s: %s", path, strerror(errno));
    bool good = read_regular(descriptor, path, data, size);
    close(descriptor);
    return good;
}

/* ---- Writing ----------------------------------------------------------------------------------- */

/* The temporary file of the one file that is on its way. */
static const char *volatile pending;

void new_file_abandon(void) {
    const char *path = pending;
    if (path)
        unlink(path);
}

static void new_file_free(struct new_file *file) {
    pending = NULL;
    free(file->path);
    free(file->temporary);
}

/* Writes the sentence, frees everything; always false. */
static bool give_up(struct new_file *file, const char *path, int reason) {
    failed("%s: cannot be written: %s", path, strerror(reason));
    new_file_free(file);
    return false;
}

/* The mode that open() would have given a new file. */
static mode_t default_mode(void) {
    mode_t mask = umask(0);
    umask(mask);
    return 0666 & ~mask;
}

bool new_file_open(struct new_file *file, const char *path) {
    *file = (struct new_file){.descriptor = STDOUT_FILENO};
    if (is_stream(path)) {
        file->path = strdup(path);
        return file->path || give_up(file, path, ENOMEM);
    }
    file->path = realpath(path, NULL);
    if (!file->path)
        file->path = strdup(path);
    struct stat about = {.st_mode = S_IFREG | default_mode()};
    if (file->path && stat(file->path, &about) == 0 && !S_ISREG(about.st_mode)) {
        failed("%s: cannot be replaced: not a regular file", path);
        new_file_free(file);
        return false;
    }
    file->mode = about.st_mode & 0777;
    if (!file->path || asprintf(&file->temporary, "%s.XXXXXX", file->path) < 0) {
        file->temporary = NULL;
        return give_up(file, path, ENOMEM);
    }
    file->descriptor = mkostemp(file->temporary, O_CLOEXEC);
    if (file->descriptor < 0)
        return give_up(file, path, errno);
    pending = file->temporary;
    return true;
}

void new_file_cancel(struct new_file *file) {
    if (file->temporary) {
        close(file->descriptor);
        unlink(file->temporary);
    }
    new_file_free(file);
}

void new_file_write(struct new_file *file, const void *data, size_t size) {
    const char *next = data;
    while (size > 0 && file->failure == 0) {
        ssize_t n = write(file->descriptor, next, size);
        if (n < 0 && errno != EINTR) {
            file->failure = errno;
        } else if (n > 0) {
            next += n;
            size -= (size_t)n;
        }
    }
}

/* A renamed file is only safe once its directory is; a file system that cannot sync one loses nothing. */
static void sync_directory(const char *path) {
    char *copy = strdup(path);
    int descriptor = copy ? open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (descriptor >= 0) {
        fsync(descriptor);
        close(descriptor);
    }
    free(copy);
}

/* What goes to standard output stays there. */
static bool end_stream(struct new_file *file) {
    if (file->failure)
        return give_up(file, "standard output", file->failure);
    new_file_free(file);
    return true;
}

bool new_file_commit(struct new_file *file) {
    if (!file->temporary)
        return end_stream(file);
    if (file->failure == 0 && (fchmod(file->descriptor, file->mode) != 0 || fsync(file->descriptor) != 0))
        file->failure = errno;
    if (close(file->descriptor) != 0 && file->failure == 0)
        file->failure = errno;
    if (file->failure == 0 && rename(file->temporary, file->path) != 0)
        file->failure = errno;
    if (file->failure != 0) {
        unlink(file->temporary);
        return give_up(file, file->path, file->failure);
    }
    sync_directory(file->path);
    new_file_free(file);
    return true;
}
