/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dirty_mdev - register map
 *
 * The device is 1234:d1d1, with one BAR of 4 KiB of 32-bit memory, and neither
 * interrupts nor capabilities. Of its configuration space a guest can write the
 * bits of the command register for memory, bus master and INTx, BAR0's address,
 * cache line size and interrupt line. The BAR answers while the command
 * register's memory bit is set, as it is when the device was opened; else
 * accesses fail with EIO. Bus master changes nothing: tests start DMA unasked.
 *
 * BAR0 (region 0) holds 64-bit registers, little endian. Each is read or
 * written whole, with an aligned access of 8 bytes, or a half at a time with
 * 4 bytes: a high half that is written waits until the next low half is, which
 * writes the register; a low half alone is extended with zeros. Other accesses
 * fail with EINVAL.
 *
 *	0x000	ID	 ro	DIRTY_MDEV_ID
 *	0x008	CONTROL	 rw	bit 0, RUN: the engine writes at RATE
 *	0x010	SEED	 rw	of the stream; writing it sets POSITION to 0
 *	0x018	POSITION ro	writes drawn from the stream so far
 *	0x020	COUNT	 ro	of them, those that landed in memory
 *	0x028	ERRORS	 ro	and those that were refused: nothing mapped there
 *	0x030	RATE	 rw	writes per second
 *	0x038	BURST	 wo	do this many writes of the stream now
 *	0x040	WRITE_AT wo	write one word at this IOVA, now. The word is the
 *				IOVA's complement; the stream does not advance
 *	0x048	PIN	 wo	pin the page at this IOVA
 *	0x050	UNPIN	 wo	unpin it
 *	0x058	PINNED	 ro	number of pinned pages
 *	0x100 + 16 * i	 rw	IOVA of window i, 0 <= i < 16
 *	0x108 + 16 * i	 rw	its length in bytes, 0: none. Both multiples of 8
 *
 * BURST and WRITE_AT return when the writes were done. They fail with EBUSY
 * unless the device is in RUNNING or PRE_COPY, and with EFAULT when a word
 * could not be written; a failed burst has still drawn all its writes, unless
 * it was a change of state that cut it short.
 *
 * The stream: write number p, counted from 0, stores the word random(2p + 1)
 * in slot random(2p) mod slots. Slots are the aligned 8-byte words of all
 * windows, numbered through in the order of the windows, and random(n) is
 * splitmix64's output number n from the state SEED:
 *
 *	z = SEED + (n + 1) * 0x9e3779b97f4a7c15
 *	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
 *	z = (z ^ (z >> 27)) * 0x94d049bb133111eb
 *	random(n) = z ^ (z >> 31)
 *
 * All registers but PINNED are the state that migrates: the destination's
 * engine writes the words that the source's would have written next. Pinned
 * pages are not state.
 */
#ifndef DIRTY_MDEV_H
#define DIRTY_MDEV_H

#define DIRTY_MDEV_VENDOR		0x1234
#define DIRTY_MDEV_DEVICE		0xd1d1

#define DIRTY_MDEV_ID			0x56444d5954524944ULL	/* "DIRTYMDV" */
#define DIRTY_MDEV_WINDOWS		16

#define DIRTY_MDEV_REG_ID		0x000
#define DIRTY_MDEV_REG_CONTROL		0x008
#define   DIRTY_MDEV_CONTROL_RUN	  0x1
#define DIRTY_MDEV_REG_SEED		0x010
#define DIRTY_MDEV_REG_POSITION		0x018
#define DIRTY_MDEV_REG_COUNT		0x020
#define DIRTY_MDEV_REG_ERRORS		0x028
#define DIRTY_MDEV_REG_RATE		0x030
#define DIRTY_MDEV_REG_BURST		0x038
#define DIRTY_MDEV_REG_WRITE_AT		0x040
#define DIRTY_MDEV_REG_PIN		0x048
#define DIRTY_MDEV_REG_UNPIN		0x050
#define DIRTY_MDEV_REG_PINNED		0x058
#define DIRTY_MDEV_REG_WINDOW		0x100
#define DIRTY_MDEV_BAR_BYTES		0x1000

#endif
