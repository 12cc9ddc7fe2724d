//! `--console` of `bulkhead run` and `bulkhead ctl create`: text in, [`ConsoleConfig`] out; and the
//! sizes of `ctl resize-console`. Runs in the command line's process.

use bulkhead_proto::common::ConsoleSize;
use bulkhead_proto::machine::{ConsoleConfig, ConsolePort};

use super::machine_args::{Keys, absolute, check_id, split_option};
use super::resource_args;

/// What `--console` takes, for its errors.
const FORM: &str = "socket=PATH[,name=NAME|,size=COLSxROWS][,socket=…]…[,id=NAME][,cpu=PERCENT][,memory=SIZE][,pids=N]";

/// A console device from its option; `index` names it when the text does not.
///
/// # Errors
/// One line that names the option, the key and what it takes.
pub fn parse_console(text: &str, index: usize) -> Result<ConsoleConfig, String> {
    let option = format!("--console {text}");
    let mut console = ConsoleConfig::new();
    let parts = split_option(text);
    let mut keys = Keys::default();
    // Of the present port.
    let mut own = Keys::default();
    for part in parts.iter().map(String::as_str) {
        let unknown =
            |what: &str| Err(format!("{option}: {what:?} is unknown: the form is {FORM}"));
        let Some((key, value)) = part.split_once('=') else {
            return unknown(part);
        };
        match key {
            "socket" => {
                let mut port = ConsolePort::new();
                port.socket = absolute(&option, value)?;
                console.ports.push(port);
                own = Keys::default();
            }
            "name" | "size" => {
                own.once(&option, key)?;
                let Some(port) = console.ports.last_mut() else {
                    return Err(format!(
                        "{option}: {part}: whose? give socket=PATH of the port before it"
                    ));
                };
                if key == "name" {
                    check_id(value).map_err(|e| format!("{option}: name={value}: {e}"))?;
                    port.name = value.to_owned();
                } else {
                    (port.cols, port.rows) =
                        parse_size(value).map_err(|e| format!("{option}: size={value}: {e}"))?;
                }
            }
            "id" => {
                keys.once(&option, key)?;
                console.id = value.to_owned();
            }
            key if resource_args::KEYS.contains(&key) && key != "io" => {
                keys.once(&option, key)?;
                let resources = console.resources.mut_or_insert_default();
                resource_args::set(resources, key, value).map_err(|e| format!("{option}: {e}"))?;
            }
            _ => return unknown(key),
        }
    }
    if console.ports.is_empty() {
        return Err(format!(
            "{option}: socket=PATH is missing: name the socket that clients connect to"
        ));
    }
    if console.id.is_empty() {
        console.id = format!("console{index}");
    }
    check_id(&console.id).map_err(|e| format!("{option}: id={}: {e}", console.id))?;
    Ok(console)
}

/// `COLSxROWS`
fn parse_size(text: &str) -> Result<(u32, u32), String> {
    let number = |text: &str| text.parse::<u16>().ok().filter(|n| *n > 0).map(u32::from);
    let size = text.split_once('x');
    size.and_then(|(cols, rows)| Some((number(cols)?, number(rows)?)))
        .ok_or_else(|| "give columns and rows, such as 80x24".to_owned())
}

/// `[PORT:]COLSxROWS`
///
/// # Errors
/// One line.
pub fn parse_port_size(text: &str) -> Result<ConsoleSize, String> {
    let (port, size) = text.split_once(':').unwrap_or(("0", text));
    let mut of = ConsoleSize::new();
    of.port = port
        .parse()
        .map_err(|_| format!("{text}: give [PORT:]COLSxROWS, such as 80x24 or 2:80x24"))?;
    (of.cols, of.rows) = parse_size(size).map_err(|e| format!("{text}: {e}"))?;
    Ok(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_socket_is_a_port_and_what_follows_is_of_it() {
        let plain = parse_console("socket=/run/c", 2).unwrap();
        assert_eq!((plain.id.as_str(), plain.ports.len()), ("console2", 1));
        let all = "id=c,socket=/a,size=80x24,socket=/b,name=agent.0,cpu=50,socket=/c";
        let all = parse_console(all, 0).unwrap();
        assert_eq!((all.id.as_str(), all.resources.cpu_percent), ("c", 50));
        let ports: Vec<_> = all
            .ports
            .iter()
            .map(|p| (p.socket.as_str(), p.name.as_str(), p.cols, p.rows))
            .collect();
        assert_eq!(
            ports,
            [
                ("/a", "", 80, 24),
                ("/b", "agent.0", 0, 0),
                ("/c", "", 0, 0)
            ]
        );
        for bad in [
            "",
            "/a",
            "socket=",
            "id=c",
            "name=x,socket=/a",
            "socket=/a,name=",
            "socket=/a,name=a/b",
            "socket=/a,name=x,name=y",
            "socket=/a,size=80",
            "socket=/a,size=0x24",
            "socket=/a,size=80x65536",
            "socket=/a,id=/",
            "socket=/a,id=b,id=c",
            "socket=/a,io=rbps=1",
        ] {
            let line = parse_console(bad, 0).unwrap_err();
            assert!(line.starts_with("--console"), "{line}");
        }
    }

    #[test]
    fn a_size_is_of_the_first_port_or_of_a_named_one() {
        let size = parse_port_size("132x43").unwrap();
        assert_eq!((size.port, size.cols, size.rows), (0, 132, 43));
        assert_eq!(parse_port_size("3:1x2").unwrap().port, 3);
        for bad in ["", "80", "x:80x24", "1:80", "1:0x0"] {
            assert!(parse_port_size(bad).is_err(), "{bad}");
        }
    }
}
