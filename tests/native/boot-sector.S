# A boot sector for the BIOS: says a line on COM1, reads the disk's second sector by the BIOS's own driver (INT 13h,
# AH=42h), says what is in it, writes it to the third (AH=43h), and ends QEMU by isa-debug-exit (status 33).
    .code16
    .globl start
start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    movb %dl, drive
    movw $hello, %si
    call say
    movb $0x42, %ah
    call transfer
    jc failed
    movw $0x8000, %si
    call say
    movb $3 - 1, packet + 8
    movw $0x4300, %ax
    call transfer
    jc failed
    movw $done, %si
    call say
leave:
    movw $0xf4, %dx
    movb $16, %al
    outb %al, %dx
stop:
    hlt
    jmp stop
failed:
    movw $bad, %si
    call say
    jmp leave

transfer:
    movb drive, %dl
    movw $packet, %si
    int $0x13
    ret

# The string at SI, to its NUL.
say:
    lodsb
    testb %al, %al
    jz said
    movb %al, %bl
    movw $0x3fd, %dx
ready:
    inb %dx, %al
    testb $0x20, %al
    jz ready
    movw $0x3f8, %dx
    movb %bl, %al
    outb %al, %dx
    jmp say
said:
    ret

hello:  .asciz "BOOT-SECTOR RUNS\r\n"
done:   .asciz "BOOT-SECTOR DONE\r\n"
bad:    .asciz "BOOT-SECTOR FAILED\r\n"
drive:  .byte 0
    .balign 4
packet: .byte 16, 0             # size, reserved
        .word 1                 # sectors
        .word 0x8000, 0         # offset, segment
        .quad 1                 # first sector
    .org 510
    .word 0xaa55
