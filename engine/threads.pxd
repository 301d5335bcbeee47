# POSIX threads as the engine uses them: mutexes and condition variables that are waited for without the GIL.
# Rule: nobody takes the GIL while holding a mutex, and nobody waits for a mutex while holding the GIL for longer than
# the few instructions that other holders need.

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)

cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <time.h>

    static inline int vmbackupd_cond_init(pthread_cond_t *cond)
    {
        pthread_condattr_t attributes;
        int result = pthread_condattr_init(&attributes);
        if (result != 0)
            return result;
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        result = pthread_cond_init(cond, &attributes);
        pthread_condattr_destroy(&attributes);
        return result;
    }

    static inline void vmbackupd_cond_wait_ms(pthread_cond_t *cond, pthread_mutex_t *mutex, unsigned ms)
    {
        struct timespec end;
        clock_gettime(CLOCK_MONOTONIC, &end);
        end.tv_sec += ms / 1000;
        end.tv_nsec += (long)(ms % 1000) * 1000000;
        if (end.tv_nsec >= 1000000000) {
            end.tv_nsec -= 1000000000;
            end.tv_sec += 1;
        }
        pthread_cond_timedwait(cond, mutex, &end);
    }
    """
    # a condition variable whose timed waits do not depend on the host's date
    int cond_init_monotonic "vmbackupd_cond_init"(pthread_cond_t *) nogil
    # until it is signalled, at most so long; also for no reason at all
    void cond_wait_ms "vmbackupd_cond_wait_ms"(pthread_cond_t *, pthread_mutex_t *, unsigned int) nogil
