//! `--rng` of `bulkhead run` and `bulkhead ctl create`: text in, [`RngConfig`] out. Runs in the
//! command line's process.

use bulkhead_proto::common::TokenBucket;
use bulkhead_proto::machine::RngConfig;

use super::machine_args::{Keys, check_id, parse_size, split_option};
use super::resource_args;

/// What `--rng` takes, for its errors.
const RNG_FORM: &str = "[id=NAME][,bps=SIZE[:BURST]][,cpu=PERCENT][,memory=SIZE][,pids=N]";

/// An entropy device from its option; `index` names it when the text does not.
///
/// # Errors
/// One line that names the option, the key and what it takes.
pub fn parse_rng(text: &str, index: usize) -> Result<RngConfig, String> {
    let option = format!("--rng {text}");
    let mut rng = RngConfig::new();
    let parts = split_option(text);
    let mut keys = Keys::default();
    // An empty text is one empty part.
    let parts = parts.iter().map(String::as_str);
    for part in parts.filter(|_| !text.is_empty()) {
        let unknown = |what: &str| {
            Err(format!(
                "{option}: {what:?} is unknown: the form is {RNG_FORM}"
            ))
        };
        let Some((key, value)) = part.split_once('=') else {
            return unknown(part);
        };
        keys.once(&option, key)?;
        match key {
            "id" => rng.id = value.to_owned(),
            "bps" => {
                let bucket = parse_bucket(value).ok_or_else(|| {
                    format!(
                        "{option}: bps={value}: give N or N:BURST, bytes per second and bytes, such as 1M:64K"
                    )
                })?;
                rng.bytes = Some(bucket).into();
            }
            key if resource_args::KEYS.contains(&key) && key != "io" => {
                let resources = rng.resources.mut_or_insert_default();
                resource_args::set(resources, key, value).map_err(|e| format!("{option}: {e}"))?;
            }
            _ => return unknown(key),
        }
    }
    if rng.id.is_empty() {
        rng.id = format!("rng{index}");
    }
    check_id(&rng.id).map_err(|e| format!("{option}: id={}: {e}", rng.id))?;
    Ok(rng)
}

/// `SIZE[:BURST]`
fn parse_bucket(text: &str) -> Option<TokenBucket> {
    let mut bucket = TokenBucket::new();
    let (rate, burst) = match text.split_once(':') {
        Some((rate, burst)) => (rate, Some(burst)),
        None => (text, None),
    };
    bucket.per_second = parse_size(rate).ok()?;
    bucket.burst = burst.map_or(Ok(0), parse_size).ok()?;
    Some(bucket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_understood_and_none_is_needed() {
        assert_eq!(parse_rng("", 0).unwrap().id, "rng0");
        let rng = parse_rng("id=dice,bps=1M:64K,cpu=10,pids=8", 3).unwrap();
        assert_eq!(rng.id, "dice");
        assert_eq!((rng.bytes.per_second, rng.bytes.burst), (1 << 20, 1 << 16));
        assert_eq!(rng.resources.cpu_percent, 10);
        let plain = parse_rng("bps=1000", 3).unwrap();
        assert_eq!((plain.id.as_str(), plain.bytes.burst), ("rng3", 0));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for bad in [
            "dice",
            "id=",
            "id=../x",
            "bps=",
            "bps=0",
            "bps=1:x",
            "io=rbps=1",
            "source=/x",
            ",",
            "id=a,id=b",
        ] {
            match (parse_rng(bad, 0), bad) {
                // As without it.
                (Ok(rng), "id=") => assert_eq!(rng.id, "rng0"),
                (Ok(rng), _) => panic!("{bad}: {rng}"),
                (Err(line), _) => assert!(line.starts_with("--rng "), "{line}"),
            }
        }
    }
}
