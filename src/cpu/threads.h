/* SPDX-License-Identifier: MIT */
/* How many threads a call takes. */
#ifndef KDA_CPU_THREADS_H
#define KDA_CPU_THREADS_H

/* What num_threads 0 stands for: the processors that this process may use, by the affinity of the first thread that asks
 * and the quota of the process's cgroup, bounded by the environment. The same for as long as the process lives. 0 with an
 * error if the environment holds nonsense. */
int kda_default_threads(void);

/* The threads that a call takes, at least 1: as many as num_threads (0: the default) allows and as pay for work that takes
 * one thread `microseconds`. 0 with an error as above. */
int kda_threads_for(int num_threads, double microseconds);

/* The least quota, in processors, of the cgroups that `membership` (/proc/self/cgroup) names and those above them, whose
 * trees are mounted at `root` (/sys/fs/cgroup); INT_MAX without one. */
int kda_cgroup_quota(const char *membership, const char *root);

#endif
