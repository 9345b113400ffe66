# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#
# The guest: walks its ranges for ever, checks that every page still carries what the
# pass before wrote, and stamps it anew. Position-independent 64-bit code, no stack,
# no interrupts. Assembled into the VMM's read-only data by `global_asm!`; names
# in braces are filled in there.
#
# A page's stamp (pass, number of the page, check word):
#     +0     pass
#     +8     page number = gpa / 4096
#     +4088  check = pass * K1  ^  page number * K2  ^  seed
# The check word stands at the far end, so that half a page is noticed as well.
#
# Registers, as the VMM sets them at boot:
#     rbx  walk table: count, then (start, end) pairs of guest-physical addresses
#     rbp  progress page: +0 passes completed, +8 pages stamped, +16 wrong pages,
#          +24 address of the last wrong page
#     r8   seed      r9  K1      r10  K2
#     r12  pass being written, less one (0)
#     rcx  pages the VMM still grants (0)
# and as the code uses them:
#     r13  page being looked at   r14  end of its range   r15  entry of the walk table
#     rdi  ranges left            rsi  page number
#     rdx  the part of the check word that no pass changes

.Lnext_pass:
    inc     r12
    mov     rdi, [rbx]
    lea     r15, [rbx + 8]
.Lnext_range:
    mov     r13, [r15]
    mov     r14, [r15 + 8]

.Lnext_page:
    test    rcx, rcx
    jnz     .Lcheck
    mov     edx, {port_grant}           # how many pages may I stamp? 0: ask again
    in      eax, dx
    mov     ecx, eax
    jmp     .Lnext_page

.Lcheck:
    dec     rcx
    mov     rsi, r13
    shr     rsi, 12
    mov     rdx, rsi
    imul    rdx, r10
    xor     rdx, r8
    lea     rax, [r12 - 1]
    cmp     [r13], rax
    jne     .Lwrong
    cmp     [r13 + 8], rsi
    jne     .Lwrong
    imul    rax, r9
    xor     rax, rdx
    cmp     [r13 + {check_offset}], rax
    jne     .Lwrong

.Lstamp:
    mov     rax, r12
    imul    rax, r9
    xor     rax, rdx
    mov     [r13], r12
    mov     [r13 + 8], rsi
    mov     [r13 + {check_offset}], rax
    inc     qword ptr [rbp + {progress_pages}]
    add     r13, 4096
    cmp     r13, r14
    jb      .Lnext_page
    add     r15, 16
    dec     rdi
    jnz     .Lnext_range
    mov     [rbp + {progress_passes}], r12
    jmp     .Lnext_pass

.Lwrong:
    inc     qword ptr [rbp + {progress_wrong}]
    mov     [rbp + {progress_last_wrong}], r13
    mov     r11, rdx
    mov     eax, esi
    mov     edx, {port_wrong_page}      # tell the VMM: this page number
    out     dx, eax
    mov     rdx, r11
    jmp     .Lstamp
