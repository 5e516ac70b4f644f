/* Counts the changing file operations of a process below one folder, and lets the n-th of them fail or be its last.
   Loaded with LD_PRELOAD, so that writes from Python, C++ and Rust are all seen. See faults.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[PATH_MAX], names[1 << 16];
static long seen, due;
static int deadly, failure;

void fault_arm(const char *folder, long n, int die, int error) {
    snprintf(place, sizeof place, "%s", folder);
    seen = 0, due = n, deadly = die, failure = error, names[0] = 0;
}
const char *fault_names(void) { return names; }

/* Whether a path (absolute, or relative to an open folder), or an open file, lies below the folder. */
static int below(int handle, const char *path) {
    char name[PATH_MAX] = "", link[64];
    if (!place[0]) return 0;
    if (path && path[0] == '/') {
        snprintf(name, sizeof name, "%s", path);
    } else {
        snprintf(link, sizeof link, handle == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", handle);
        ssize_t size = readlink(link, name, sizeof name - 1);
        name[size < 0 ? 0 : size] = 0;
    }
    return strncmp(name, place, strlen(place)) == 0;
}

static int hit(const char *what, int relevant) {
    if (!relevant) return 0;
    size_t used = strlen(names);
    snprintf(names + used, sizeof names - used, "%s\n", what);
    if (++seen != due) return 0;
    if (deadly) _exit(137);
    errno = failure;
    return 1;
}

#define REAL(name) ({ static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })
#define WRAP(result, name, arguments, relevant, call) \
    result name arguments { if (hit(#name, relevant)) return (result)-1; return REAL(name) call; }
#define CHANGES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        if (CHANGES(flags) && hit("open", below(AT_FDCWD, path))) return -1; \
        return REAL(name)(path, flags, mode); }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        if (CHANGES(flags) && hit("open", below(folder, path))) return -1; \
        return REAL(name)(folder, path, flags, mode); }
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        if (mode[strcspn(mode, "wa+")] && hit("open", below(AT_FDCWD, path))) return NULL; \
        return REAL(name)(path, mode); }

OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) FOPEN(fopen) FOPEN(fopen64)

/* A process that dies in a write leaves half of it behind. */
static int torn(int file) { return deadly && seen + 1 == due && below(file, NULL); }
ssize_t write(int file, const void *bytes, size_t size) {
    if (torn(file)) REAL(write)(file, bytes, size / 2);
    if (hit("write", below(file, NULL))) return -1;
    return REAL(write)(file, bytes, size);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    if (torn(file)) REAL(write)(file, parts[0].iov_base, parts[0].iov_len / 2);
    if (hit("write", below(file, NULL))) return -1;
    return REAL(writev)(file, parts, count);
}
WRAP(ssize_t, pwrite64, (int file, const void *bytes, size_t size, off64_t at), below(file, NULL), (file, bytes, size, at))
WRAP(int, ftruncate64, (int file, off64_t size), below(file, NULL), (file, size))
WRAP(int, truncate64, (const char *path, off64_t size), below(AT_FDCWD, path), (path, size))
WRAP(int, msync, (void *start, size_t size, int flags), place[0], (start, size, flags))
WRAP(int, fsync, (int file), below(file, NULL), (file))
WRAP(int, fdatasync, (int file), below(file, NULL), (file))
WRAP(int, mkdir, (const char *path, mode_t mode), below(AT_FDCWD, path), (path, mode))
WRAP(int, rename, (const char *from, const char *to), below(AT_FDCWD, to), (from, to))
WRAP(int, renameat, (int a, const char *from, int b, const char *to), below(b, to), (a, from, b, to))
WRAP(int, unlink, (const char *path), below(AT_FDCWD, path), (path))
WRAP(int, unlinkat, (int folder, const char *path, int flags), below(folder, path), (folder, path, flags))
WRAP(int, rmdir, (const char *path), below(AT_FDCWD, path), (path))
