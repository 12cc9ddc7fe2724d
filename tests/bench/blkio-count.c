/*
 * Linked into libblkio's blkio-bench: takes the place of read(2) and adds up what is read from eventfds. A read
 * of one returns how often the device signalled since the last, so the sum is the number of interrupts, none lost
 * to merging. At the end one line on stderr: `interrupts: N`. (Kicks cannot be had this way: libblkio writes them by
 * system call instructions of its own.)
 */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

static _Atomic uint64_t interrupts;

ssize_t read(int fd, void *buf, size_t len)
{
    ssize_t n = syscall(SYS_read, fd, buf, len);
    if (len == 8 && n == 8) {
        atomic_fetch_add_explicit(&interrupts, *(uint64_t *)buf, memory_order_relaxed);
    }
    return n;
}

__attribute__((destructor)) static void report(void)
{
    fprintf(stderr, "interrupts: %llu\n", (unsigned long long)interrupts);
}
