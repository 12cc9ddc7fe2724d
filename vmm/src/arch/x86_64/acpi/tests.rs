//! The tables, checked byte by byte and by ACPICA's compiler.

use super::*;
use std::process::Command;

fn config(cpus: u32) -> AcpiConfig<'static> {
    AcpiConfig {
        cpus,
        max_cpus: cpus,
        pci_mem64: layout::HIGH_RAM_START..layout::HIGH_RAM_START + layout::PCI_MEM64_SIZE,
        last_bus: 255,
        ports: &[1, 2, 31],
        ram: vec![0..512 << 20; 1],
        pluggable: None,
    }
}

fn at(tables: &[u8], address: u64) -> &[u8] {
    let start = (address - layout::ACPI_START) as usize;
    let len = u32::from_le_bytes(tables[start + 4..start + 8].try_into().unwrap()) as usize;
    &tables[start..start + len]
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// All tables that the RSDP leads to, by signature.
fn walk(rsdp: &[u8], tables: &[u8]) -> Vec<(String, Vec<u8>)> {
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    let xsdt = at(tables, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
    assert_eq!(sum(xsdt), 0);
    let mut found = Vec::new();
    for entry in xsdt[36..].chunks_exact(8) {
        let address = u64::from_le_bytes(entry.try_into().unwrap());
        assert_eq!(address % ALIGN, 0);
        let table = at(tables, address).to_vec();
        if table.starts_with(b"FACP") {
            let dsdt = u64::from_le_bytes(table[140..148].try_into().unwrap());
            found.push(("DSDT".to_owned(), at(tables, dsdt).to_vec()));
        }
        found.push((String::from_utf8(table[..4].to_vec()).unwrap(), table));
    }
    found
}

#[test]
fn every_table_is_reached_and_its_checksum_is_right() {
    for cpus in [1, 2, 254] {
        let (rsdp, tables) = build(&config(cpus));
        let found = walk(&rsdp, &tables);
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["DSDT", "FACP", "APIC", "MCFG"]);
        for (name, table) in &found {
            assert_eq!(sum(table), 0, "{name}");
        }
        let madt = &found[2].1;
        assert_eq!(madt.len(), 44 + 8 * cpus as usize + 12);
        assert!(tables.len() as u64 <= layout::EXTENDED_RAM_START - layout::ACPI_START);
    }
}

#[test]
fn the_srat_tells_of_memory_that_can_be_plugged() {
    let mut growing = config(2);
    growing.pluggable = Some(4 << 30..8 << 30);
    let (rsdp, tables) = build(&growing);
    let (name, srat) = walk(&rsdp, &tables).pop().unwrap();
    assert_eq!((name.as_str(), sum(&srat)), ("SRAT", 0));
    assert_eq!(srat.len(), 48 + 2 * 16 + 2 * 40);
    let memory = &srat[48 + 2 * 16 + 40..];
    assert_eq!(memory[..2], [1, 40]);
    assert_eq!(memory[8..16], (4_u64 << 30).to_le_bytes());
    assert_eq!(memory[16..24], (4_u64 << 30).to_le_bytes());
    assert_eq!(memory[28..32], 3_u32.to_le_bytes());
}

#[test]
fn the_fadt_is_hardware_reduced_and_names_its_registers() {
    let (rsdp, tables) = build(&config(1));
    let fadt = &walk(&rsdp, &tables)[1].1;
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags & (1 << 20), 1 << 20, "HW_REDUCED_ACPI");
    assert_eq!(flags & (1 << 10), 1 << 10, "RESET_REG_SUP");
    let port = |at: usize| {
        assert_eq!(fadt[at], 1, "a system I/O address");
        u64::from_le_bytes(fadt[at + 4..at + 12].try_into().unwrap())
    };
    assert_eq!(port(116), layout::RESET_PORT);
    assert_eq!(fadt[128], layout::RESET_VALUE);
    assert_eq!(port(244), layout::SLEEP_CONTROL_PORT);
    assert_eq!(port(256), layout::SLEEP_CONTROL_PORT + 1);
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let ram = crate::memory::GuestRam::new(crate::memory::MIN_MEMORY).unwrap();
    let room: Vec<u8> = (0..3000).map(|n| n as u8).collect();
    let mut big = config(1);
    big.ports = &room;
    let error = write_tables(ram.memory(), &big).unwrap_err();
    assert!(matches!(error, AcpiError::TooBig { .. }));
    assert_eq!(
        write_tables(ram.memory(), &config(254)).unwrap(),
        layout::RSDP_START
    );
}

/// Decompiles and compiles every table with ACPICA's iasl, where it is installed, and takes
/// neither an error nor a warning.
#[test]
fn acpica_reads_and_rebuilds_every_table() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl (package acpica-tools) is not installed");
        return;
    }
    let dir = std::env::temp_dir().join(format!("bulkhead-acpi-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let growing = AcpiConfig {
        max_cpus: 20,
        pluggable: Some(4 << 30..8 << 30),
        ..config(3)
    };
    let (rsdp, tables) = build(&growing);
    for (name, table) in walk(&rsdp, &tables) {
        let aml = dir.join(format!("{name}.dat"));
        std::fs::write(&aml, &table).unwrap();
        let run = |args: &[&str]| {
            let out = Command::new("iasl")
                .args(args)
                .current_dir(&dir)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned()
                + &String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success(), "{name}: iasl {args:?}: {text}");
            text
        };
        run(&["-d", &format!("{name}.dat")]);
        let text = run(&["-oa", "-p", &format!("{name}-new"), &format!("{name}.dsl")]);
        assert!(text.contains("0 Errors, 0 Warnings"), "{name}: {text}");
        if name == "DSDT" {
            let rebuilt = std::fs::read(dir.join("DSDT-new.aml")).unwrap();
            // The compiler puts its own name and revision into the header.
            assert_eq!(
                rebuilt[36..],
                table[36..],
                "the AML comes back byte for byte"
            );
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
