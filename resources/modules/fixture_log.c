// SPDX-License-Identifier: GPL-2.0-only
/*
 * The log of a device's DMA writes, behind VFIO_DEVICE_FEATURE_DMA_LOGGING_*.
 *
 * Writes are kept by page, exactly; a granule coarser than a page only widens
 * what a report shows. Writes outside the ranges that START named are not kept,
 * as with real hardware: a user that left memory out of the ranges loses them.
 */
#include <linux/module.h>
#include <linux/slab.h>

#include "vfio_fixture.h"

static unsigned long log_granule;
module_param(log_granule, ulong, 0644);
MODULE_PARM_DESC(log_granule, "Bytes per bit chosen at START; 0: as asked");

static unsigned int log_max_ranges;
module_param(log_max_ranges, uint, 0644);
MODULE_PARM_DESC(log_max_ranges, "More ranges than this: START fails with E2BIG; 0: no limit");

static unsigned long log_max_length;
module_param(log_max_length, ulong, 0644);
MODULE_PARM_DESC(log_max_length, "Ranges of more bytes in all: START fails with EOPNOTSUPP; 0: no limit");

static bool log_whole_words;
module_param(log_whole_words, bool, 0644);
MODULE_PARM_DESC(log_whole_words, "REPORT clears whole words of 64 granules, and drops bits in them that were not asked for");

static unsigned int fault_log_start;
module_param(fault_log_start, uint, 0644);
MODULE_PARM_DESC(fault_log_start, "errno that START fails with; 0: none");

static unsigned int fault_log_report;
module_param(fault_log_report, uint, 0644);
MODULE_PARM_DESC(fault_log_report, "The n-th REPORT from now fails with EIO, as do all after it until STOP; 0: none");

void fixture_log_init(struct fixture_log *log)
{
	mutex_init(&log->lock);
	xa_init(&log->dirty);
}

static bool log_covers(const struct fixture_log *log, unsigned long page)
{
	unsigned long iova = page << PAGE_SHIFT;
	unsigned int i;

	for (i = 0; i < log->nr_ranges; i++)
		if (iova + PAGE_SIZE - 1 >= log->ranges[i].first &&
		    iova <= log->ranges[i].last)
			return true;
	return false;
}

static void log_mark(struct fixture_log *log, unsigned long first,
		     unsigned long last)
{
	unsigned long page;

	if (!log->started)
		return;
	for (page = first >> PAGE_SHIFT; page <= last >> PAGE_SHIFT; page++) {
		if (!log_covers(log, page))
			continue;
		if (xa_err(xa_store(&log->dirty, page, xa_mk_value(1),
				    GFP_KERNEL)))
			log->broken = true;
	}
}

static bool log_page_is_held(const struct fixture_log *log, unsigned long page)
{
	return log->held && page >= log->hold_first >> PAGE_SHIFT &&
	       page <= log->hold_last >> PAGE_SHIFT;
}

void fixture_log_write(struct fixture *f, unsigned long iova, size_t length)
{
	mutex_lock(&f->log.lock);
	log_mark(&f->log, iova, iova + length - 1);
	mutex_unlock(&f->log.lock);
}
EXPORT_SYMBOL_GPL(fixture_log_write);

void fixture_log_hold(struct fixture *f, unsigned long iova, size_t length)
{
	struct fixture_log *log = &f->log;

	mutex_lock(&log->lock);
	log->held = true;
	log->hold_first = iova;
	log->hold_last = iova + length - 1;
	log_mark(log, log->hold_first, log->hold_last);
	mutex_unlock(&log->lock);
}
EXPORT_SYMBOL_GPL(fixture_log_hold);

void fixture_log_release(struct fixture *f)
{
	mutex_lock(&f->log.lock);
	f->log.held = false;
	mutex_unlock(&f->log.lock);
}
EXPORT_SYMBOL_GPL(fixture_log_release);

static int log_take_ranges(struct fixture_log *log,
			   struct rb_root_cached *root, u32 nr)
{
	struct interval_tree_node *node;
	unsigned long total = 0;

	if (log_max_ranges && nr > log_max_ranges)
		return -E2BIG;

	log->ranges = kcalloc(nr, sizeof(*log->ranges), GFP_KERNEL);
	if (!log->ranges)
		return -ENOMEM;
	log->nr_ranges = 0;
	for (node = interval_tree_iter_first(root, 0, ULONG_MAX); node;
	     node = interval_tree_iter_next(node, 0, ULONG_MAX)) {
		log->ranges[log->nr_ranges].first = node->start;
		log->ranges[log->nr_ranges].last = node->last;
		log->nr_ranges++;
		total += node->last - node->start + 1;
	}

	if (log_max_length && total > log_max_length) {
		kfree(log->ranges);
		log->ranges = NULL;
		return -EOPNOTSUPP;
	}
	return 0;
}

int fixture_log_start(struct fixture *f, struct rb_root_cached *ranges,
		      u32 nr_ranges, u64 *page_size)
{
	struct fixture_log *log = &f->log;
	int ret;

	if (fault_log_start && fixture_is_target(f))
		return -(int)fault_log_start;

	mutex_lock(&log->lock);
	ret = -EINVAL;
	if (log->started)
		goto unlock;
	ret = log_take_ranges(log, ranges, nr_ranges);
	if (ret)
		goto unlock;

	log->granule = log_granule ?: *page_size;
	log->granule = max(roundup_pow_of_two(log->granule), PAGE_SIZE);
	*page_size = log->granule;
	log->broken = false;
	log->started = true;
	/* DMA may have been started before the log was. */
	if (log->held)
		log_mark(log, log->hold_first, log->hold_last);
unlock:
	mutex_unlock(&log->lock);
	return ret;
}
EXPORT_SYMBOL_GPL(fixture_log_start);

/* Stopping a log that was not started succeeds, as with other drivers. */
int fixture_log_stop(struct fixture *f)
{
	struct fixture_log *log = &f->log;

	mutex_lock(&log->lock);
	log->started = false;
	log->nr_ranges = 0;
	kfree(log->ranges);
	log->ranges = NULL;
	xa_destroy(&log->dirty);
	mutex_unlock(&log->lock);
	return 0;
}
EXPORT_SYMBOL_GPL(fixture_log_stop);

static void log_trip_fault(struct fixture *f)
{
	if (!fault_log_report || !fixture_is_target(f))
		return;
	fault_log_report--;
	if (!fault_log_report)
		f->log.broken = true;
}

/*
 * Clears what a driver like pds clears: it keeps one bitmap from its lowest
 * range on, and acknowledges it by the word.
 */
static void log_drop_words(struct fixture_log *log, unsigned long iova,
			   unsigned long last)
{
	unsigned long origin = log->ranges[0].first;
	unsigned long word = BITS_PER_LONG * log->granule;
	unsigned long from = origin + round_down(iova - origin, word);
	unsigned long to = origin + ((last - origin) | (word - 1));
	unsigned long page;
	void *entry;

	xa_for_each_range(&log->dirty, page, entry, from >> PAGE_SHIFT,
			  to >> PAGE_SHIFT)
		if (!log_page_is_held(log, page))
			xa_erase(&log->dirty, page);
}

int fixture_log_report(struct fixture *f, unsigned long iova,
		       unsigned long length, struct iova_bitmap *dirty)
{
	struct fixture_log *log = &f->log;
	unsigned long last = iova + length - 1;
	unsigned long page;
	void *entry;
	int ret;

	if (f->ops->settle)
		f->ops->settle(f);

	mutex_lock(&log->lock);
	ret = -EINVAL;
	if (!log->started)
		goto unlock;
	log_trip_fault(f);
	ret = -EIO;
	if (log->broken)
		goto unlock;

	xa_for_each_range(&log->dirty, page, entry, iova >> PAGE_SHIFT,
			  last >> PAGE_SHIFT) {
		unsigned long at = page << PAGE_SHIFT;
		unsigned long from = max(round_down(at, log->granule), iova);
		unsigned long to = min(at | (log->granule - 1), last);

		iova_bitmap_set(dirty, from, to - from + 1);
		if (!log_page_is_held(log, page))
			xa_erase(&log->dirty, page);
	}
	if (log_whole_words)
		log_drop_words(log, iova, last);
	ret = 0;
unlock:
	mutex_unlock(&log->lock);
	return ret;
}
EXPORT_SYMBOL_GPL(fixture_log_report);
