/* SPDX-License-Identifier: MIT */
/* A progress bar on stderr while work of several steps goes on; silent where stderr is no terminal. */
#ifndef FLASHKDA_PROGRESS_H
#define FLASHKDA_PROGRESS_H

/* Shows that step done of total steps begins; what says which. */
void progress_show(int done, int total, const char *what);

/* Wipes the bar. */
void progress_clear(void);

/* The same from a signal handler. */
void progress_abandon(void);

#endif
