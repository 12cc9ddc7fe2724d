//! Medians, and tables in Markdown that a terminal shows well too.

use std::fmt::Write;

/// The middle value; of an even number of values the mean of the two.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2).copied()?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = sorted.get((sorted.len() / 2).checked_sub(1)?).copied()?;
    Some((lower + upper) / 2.0)
}

/// `median (least–most)` with so many decimals; a dash for nothing.
pub fn spread(values: &[f64], decimals: usize) -> String {
    let Some(middle) = median(values) else {
        return "–".into();
    };
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{middle:.decimals$} ({least:.decimals$}–{most:.decimals$})")
}

/// A number with so many decimals; a dash for none.
pub fn figure(value: Option<f64>, decimals: usize) -> String {
    value
        .filter(|v| v.is_finite())
        .map_or_else(|| "–".into(), |v| format!("{v:.decimals$}"))
}

/// The value below which this share of them lies.
pub fn share(values: &[f64], of: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (sorted.len() as f64 * of).ceil() as usize;
    sorted.get(index.saturating_sub(1)).copied()
}

/// An aim, and whether it was met.
pub fn judged(what: &str, value: Option<f64>, most: f64) -> String {
    let met = value.is_some_and(|value| value <= most);
    format!(
        "{what} ≤ {most}: {}",
        if met { "met" } else { "**missed**" }
    )
}

/// Rows below a heading.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new(columns: &[&str]) -> Self {
        Self {
            rows: vec![columns.iter().map(ToString::to_string).collect()],
        }
    }

    /// One more row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Markdown, padded so that the columns stand below each other.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|r| r.get(column));
            cells.map(|c| c.chars().count()).max().unwrap_or(0).max(3)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            text.push('|');
            for (column, width) in widths.iter().enumerate() {
                let cell = row.get(column).map(String::as_str).unwrap_or_default();
                let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
                let _ = write!(text, " {cell}{pad} |");
            }
            text.push('\n');
            if index == 0 {
                for width in &widths {
                    let _ = write!(text, "|{}", "-".repeat(width + 2));
                }
                text.push_str("|\n");
            }
        }
        text
    }
}

/// Whether the ranges of two sets of runs overlap: then their medians decide nothing.
pub fn overlap(one: &[f64], other: &[f64]) -> bool {
    let least = |all: &[f64]| all.iter().copied().reduce(f64::min);
    let most = |all: &[f64]| all.iter().copied().reduce(f64::max);
    match (least(one).zip(most(one)), least(other).zip(most(other))) {
        (Some((a, b)), Some((c, d))) => a <= d && c <= b,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 9.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), Some(3.0));
        assert_eq!(spread(&[2.0, 1.0, 4.0], 1), "2.0 (1.0–4.0)");
    }

    #[test]
    fn columns_stand_below_each_other() {
        let mut table = Table::new(&["a", "column"]);
        table.row(vec!["µµµµ".into(), "1".into()]);
        let lengths: Vec<usize> = table.text().lines().map(|l| l.chars().count()).collect();
        assert_eq!(lengths, [17, 17, 17]);
    }
}
