//! Results as tables for people.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Attribute, Cell, CellAlignment, Color, Table};

use crate::latency::{Quantiles, show_us};
use crate::limits::{Limits, Transfer};
use crate::load::outcome::Direction;
use crate::load::{Kind, Outcome};
use crate::suite::Row;

pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Produce => "produce",
        Kind::Consume => "consume",
        Kind::Tail => "tail",
        Kind::Mixed => "mixed",
    }
}

pub fn new(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(header.iter().map(|name| Cell::new(name).add_attribute(Attribute::Bold)));
    table
}

/// The first columns hold names, the others figures.
pub fn align_right_from(table: &mut Table, first: usize) {
    for index in first..table.column_count() {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

pub fn limits(limits: &Limits) -> String {
    let mut table = new(&["limit", "MiB/s", "a second", "p50", "p99", "p99.9", "CPU s/GiB"]);
    let transfers = [
        ("loopback, received", &limits.loopback, limits.loopback.receiver_cpu_s_per_gib),
        ("sent from memory", &limits.sender, limits.sender.sender_cpu_s_per_gib),
    ];
    for (what, transfer, cpu) in transfers {
        let Transfer { connections, write_bytes, mib_per_s, .. } = *transfer;
        let name = format!("{what} ({connections} × {} KiB)", write_bytes >> 10);
        let [rate, cpu] = [format!("{mib_per_s:.0}"), format!("{cpu:.2}")];
        table.add_row([&name, &rate, "", "", "", "", &cpu]);
    }
    let quantiles = |latency: &Quantiles| [latency.p50_us, latency.p99_us, latency.p99_9_us].map(show_us);
    let [p50, p99, p99_9] = quantiles(&limits.round_trip);
    table.add_row(["loopback round trip, 1 KiB", "", "", &p50, &p99, &p99_9, ""]);
    for write in &limits.writes {
        let [p50, p99, p99_9] = quantiles(&write.latency);
        let rate = write.depth_4_mib_per_s;
        let per_s = rate * 1024.0 / (write.write_bytes as f64 / 1024.0);
        let name = format!("durable write, {} KiB (rate: 4 in flight)", write.write_bytes >> 10);
        table.add_row([name, format!("{rate:.0}"), format!("{per_s:.0}"), p50, p99, p99_9, String::new()]);
    }
    let read = format!("{:.0}", limits.read_mib_per_s);
    table.add_row(["sequential read, 1 MiB, 4 in flight".to_owned(), read]);
    for bare in [&limits.bare_frames, &limits.bare_half, &limits.bare_singles] {
        let [p50, p99, p99_9] = quantiles(&bare.latency);
        let shape = match bare.paced {
            true => "by the clock".to_owned(),
            false => format!("{} × {} in flight", bare.connections, bare.in_flight),
        };
        table.add_row([
            format!("bare path, {} KiB ({shape})", bare.payload_bytes >> 10),
            format!("{:.0}", bare.mib_per_s),
            format!("{:.0}", bare.frames_per_s),
            p50,
            p99,
            p99_9,
            format!("{:.2}", bare.server_cpu_s_per_gib),
        ]);
    }
    align_right_from(&mut table, 1);
    table.to_string()
}

pub fn outcome(outcome: &Outcome) -> String {
    let header = ["", "MiB/s", "msg/s", "messages", "p50", "p90", "p99", "p99.9", "p99.99", "max"];
    let mut table = new(&header);
    let mut add = |name: &str, direction: &Option<Direction>| {
        let Some(direction) = direction else { return };
        let latency = &direction.latency;
        let mut row = vec![
            name.to_owned(),
            format!("{:.1}", direction.mib_per_s),
            format!("{:.0}", direction.messages_per_s),
            direction.messages.to_string(),
        ];
        let quantiles =
            [latency.p50_us, latency.p90_us, latency.p99_us, latency.p99_9_us, latency.p99_99_us, latency.max_us];
        row.extend(quantiles.map(|us| if latency.count == 0 { "–".to_owned() } else { show_us(us) }));
        table.add_row(row);
    };
    add("published", &outcome.published);
    add("delivered", &outcome.delivered);
    align_right_from(&mut table, 1);
    let mut text = format!("{table}\n");
    text.push_str(&format!("measured {:.1} s; load generator {:.2} CPU s", outcome.elapsed_s, outcome.client_cpu_s));
    if let Some(node) = &outcome.node {
        text.push_str(&format!(
            "; node {:.2} CPU s ({:.2} a GiB, {:.2} a million messages), peak memory {:.0} MiB",
            node.cpu_s,
            node.cpu_s_per_gib,
            node.cpu_s_per_million,
            node.peak_rss_bytes as f64 / 1048576.0
        ));
    }
    text.push('\n');
    text.push_str(&verification(outcome));
    text
}

pub fn verification(outcome: &Outcome) -> String {
    let Some(found) = &outcome.verification else {
        return match outcome.kind {
            Kind::Produce => "acknowledgements were checked: each batch once, at rising offsets".to_owned(),
            Kind::Consume | Kind::Tail | Kind::Mixed => "what was delivered was not looked at".to_owned(),
        };
    };
    let foreign = match found.foreign {
        0 => String::new(),
        count => format!(" ({count} messages of others were passed over)"),
    };
    if found.faults() == 0 {
        return format!("{} messages verified: none lost, none twice, in order, unchanged{foreign}", found.messages);
    }
    format!(
        "FAULTS in {} messages: {} lost, {} twice, {} out of order, {} changed, {} offset gaps{foreign}; first: {}",
        found.messages,
        found.lost,
        found.duplicated,
        found.reordered,
        found.corrupt,
        found.offset_gaps,
        found.first_fault.as_deref().unwrap_or("–")
    )
}

pub fn rows(rows: &[Row]) -> String {
    let mut table = new(&["id", "what", "measured", "limit", "ratio", "target", "met", "note"]);
    for row in rows {
        let met = match row.met {
            Some(true) => Cell::new("yes").fg(Color::Green),
            Some(false) => Cell::new("NO").fg(Color::Red),
            None => Cell::new("–"),
        };
        table.add_row(vec![
            Cell::new(&row.id).add_attribute(Attribute::Bold),
            Cell::new(&row.what),
            Cell::new(row.show_value()).set_alignment(CellAlignment::Right),
            Cell::new(row.show_limit()).set_alignment(CellAlignment::Right),
            Cell::new(row.ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}")))
                .set_alignment(CellAlignment::Right),
            Cell::new(&row.target),
            met,
            Cell::new(&row.note),
        ]);
    }
    if !std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        return table.to_string();
    }
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    table.to_string()
}

/// The rows as a Markdown table, with the machine below it.
pub fn markdown(rows: &[Row]) -> String {
    let mut text =
        String::from("| id | what | measured | limit | ratio | target | met |\n|---|---|--:|--:|--:|---|---|\n");
    for row in rows {
        let ratio = row.ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}"));
        let met = match row.met {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "–",
        };
        let (id, what) = (&row.id, &row.what);
        let (value, limit, target) = (row.show_value(), row.show_limit(), &row.target);
        text.push_str(&format!("| {id} | {what} | {value} | {limit} | {ratio} | {target} | {met} |\n"));
    }
    if let Some(row) = rows.first() {
        let commit = if row.commit.is_empty() { String::new() } else { format!(", commit {}", row.commit) };
        text.push_str(&format!("\nOn {}{commit}.\n", row.machine.show()));
    }
    text
}
