/* meter FD PROGRAM ARGUMENT...: run a program; write its wall time (seconds) and peak memory (KiB) to descriptor FD.
 *
 * A process's peak memory is at least that of the process it was forked from, so a large parent would count for its
 * children; this one has next to nothing. Its exit status is the program's. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct timespec began, ended;
    struct rusage usage;
    int status, told;
    if (argc < 3)
        return 2;
    told = atoi(argv[1]);
    fcntl(told, F_SETFD, FD_CLOEXEC);
    clock_gettime(CLOCK_MONOTONIC, &began);
    pid_t child = fork();
    if (child == 0) {
        execvp(argv[2], argv + 2);
        perror(argv[2]);
        _exit(127);
    }
    if (child < 0 || wait4(child, &status, 0, &usage) < 0)
        return 2;
    clock_gettime(CLOCK_MONOTONIC, &ended);
    dprintf(told, "%.6f %ld\n",
            (double)(ended.tv_sec - began.tv_sec) + (double)(ended.tv_nsec - began.tv_nsec) / 1e9, usage.ru_maxrss);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
